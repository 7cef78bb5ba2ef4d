"""Sums over shares of the text do not depend on who has which, nor on how late they arrive."""

from dataclasses import dataclass, field

import pytest
import torch

from llmq.calibration.ordered_sums import ShareSums, shares_ahead
from llmq.calibration.work_split import Share
from llmq.core.distributed import ALONE, Ranks

CPU = torch.device("cpu")
SHAPES = {"H": (3, 5), "abs": (5,)}


@dataclass(frozen=True)
class Post(Ranks):
    """One of two processes, whose post is a list."""

    post: list = field(default_factory=list)
    waited: list = field(default_factory=list)

    def send(self, tensor):
        self.post.append(tensor)
        return lambda: self.waited.append(len(self.post))

    def receive(self, tensor, source):
        def wait():
            tensor.copy_(self.post.pop(0))
            self.waited.append(source)

        tensor.fill_(torch.nan)  # until one has waited
        return wait


def shares_of(size, counts=(8, 3)):
    kinds = [kind for kind, count in zip((False, True), counts, strict=True) for _ in range(count)]
    return [Share(i % size, range(1), kind) for i, kind in enumerate(kinds)]


def term(name, i):
    """What micro-batch i adds: of sizes that make the order of the additions matter."""
    generator = torch.Generator().manual_seed(i)
    return torch.randn(SHAPES[name], generator=generator) * 10.0 ** (i % 5)


def gathered(sums, shares, rank):
    for i, share in enumerate(shares):
        if share.rank == rank:
            for name in SHAPES:
                sums.growing(name).add_(term(name, 2 * i)).add_(term(name, 2 * i + 1))
        sums.fold(share)
    return sums.finish()


def in_order(held_out):
    shares = shares_of(1)
    for name in SHAPES:
        total = None
        for i, share in enumerate(shares):
            if share.held_out == held_out:
                part = term(name, 2 * i) + term(name, 2 * i + 1)
                total = part if total is None else total + part
        yield (name, held_out), total


@pytest.mark.parametrize("ahead", [0, 1, 2, 20])
def test_two_processes_get_the_sums_of_one_in_the_same_bits(ahead, monkeypatch):
    monkeypatch.setattr("llmq.calibration.ordered_sums._AHEAD", ahead)
    expected = dict(in_order(False)) | dict(in_order(True))
    alone = gathered(ShareSums(SHAPES, ALONE, CPU), shares_of(1), 0)
    post = []
    assert gathered(ShareSums(SHAPES, Post(1, 2, post), CPU), shares_of(2), 1) == {}
    first = gathered(ShareSums(SHAPES, Post(0, 2, post), CPU), shares_of(2), 0)
    for found in (alone, first):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(sum(term("H", i) for i in range(15, -1, -1)), expected["H", False])  # the order matters


def test_a_sum_that_leaves_is_not_written_to():
    post = []
    sums = ShareSums(SHAPES, Post(1, 2, post), CPU)
    for value in (1, 2, 3):
        sums.growing("H").fill_(value)
        sums.fold(Share(1, range(1), False))
    assert [float(sent[0, 0]) for sent in post if sent.shape == (3, 5)] == [1, 2, 3]


@pytest.mark.parametrize(("ahead", "waits"), [(0, [0, 1]), (1, [0, 0]), (2, [0, 0])])
def test_the_first_waits_only_for_those_that_are_further_behind(ahead, waits, monkeypatch):
    monkeypatch.setattr("llmq.calibration.ordered_sums._AHEAD", ahead)
    ranks = Post(0, 2, [torch.zeros(3, 5), torch.zeros(5)] * 4)
    sums = ShareSums(SHAPES, ranks, CPU)
    waited = []
    for rank in (0, 1):
        sums.fold(Share(rank, range(1), False))
        waited.append(len(ranks.waited) // len(SHAPES))
    assert waited == waits
    sums.finish()
    assert ranks.waited == [1, 1]


def test_large_sums_are_not_kept_in_memory_while_others_are_late():
    small, large = {"H": (64, 64)}, {"H": (11008, 11008)}
    assert shares_ahead(small, ALONE) == shares_ahead(large, ALONE) == shares_ahead(large, Ranks(0, 2)) == 0
    assert shares_ahead(large, Ranks(1, 2)) == 1  # like the first one, who has their sum beside what grows
    assert shares_ahead(small, Ranks(0, 2)) == shares_ahead(small, Ranks(1, 2)) == 2


def test_alone_two_tensors_of_a_kind_are_enough(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.append(shape) or empty(*shape, **options))
    gathered(ShareSums(SHAPES, ALONE, CPU), shares_of(1, (8, 1)), 0)
    assert made.count((3, 5)) == 2
