"""The text is divided in the same way for any number of processes."""

import pytest
import torch

from llmq.calibration.texts import Tokens
from llmq.calibration.work_split import micro_batches, portion_of, shares_of
from llmq.core.distributed import ALONE, Ranks


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_shares_do_not_depend_on_how_many_there_are(count, size):
    tokens = Tokens(torch.arange(count * 1024).view(count, 1024), torch.arange(2 * 1024).view(2, 1024))
    alone = portion_of(tokens, ALONE)
    portions = [portion_of(tokens, Ranks(rank, size)) for rank in range(size)]
    assert len(alone.shares) == min(8, count) + 2
    for i, share in enumerate(alone.shares):
        owner = portions[0].shares[i].rank
        assert [len(portion.shares[i].batches) > 0 for portion in portions] == [rank == owner for rank in range(size)]
        mine = portions[owner]
        ours = [mine.batches[j] for j in mine.shares[i].batches]
        theirs = [alone.batches[j] for j in share.batches]
        assert torch.equal(torch.cat(ours), torch.cat(theirs))
        assert all((j >= mine.held_out_from) == share.held_out for j in mine.shares[i].batches)
    assert sum(len(portion.batches) for portion in portions) == len(alone.batches)


@pytest.mark.parametrize(("train", "held_out"), [(58, 3), (7, 1), (8, 2), (1, 1)])
def test_two_processes_have_about_the_same_to_do(train, held_out):
    counts = [sum(len(share.batches) for share in shares_of(train, held_out, Ranks(rank, 2))) for rank in (0, 1)]
    assert sum(counts) == train + held_out
    assert abs(counts[0] - counts[1]) <= max(2, train // 8)


@pytest.mark.parametrize(
    ("samples", "length", "sizes"),
    [(5, 512, [2, 2, 1]), (3, 1024, [1, 1, 1]), (2, 4096, [1, 1]), (9, 300, [3, 3, 3]), (0, 512, [])],
)
def test_micro_batches_are_whole_sequences_of_about_1024_tokens(samples, length, sizes):
    tokens = torch.arange(samples * length).view(samples, length)
    batches = micro_batches(tokens)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat([torch.empty(0, length).long(), *batches]), tokens)


def test_shares_are_in_order_and_go_to_the_processes_in_turns():
    shares = shares_of(10, 2, Ranks(1, 3))
    assert [share.rank for share in shares] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert [share.held_out for share in shares] == [False] * 8 + [True] * 2
    assert [share.batches for share in shares if share.rank == 1] == [range(1), range(1, 2), range(2, 4)]
    assert not any(share.batches for share in shares if share.rank != 1)


def test_a_process_without_text_has_no_micro_batches():
    portion = portion_of(Tokens(torch.zeros(1, 1024).long(), torch.zeros(1, 1024).long()), Ranks(2, 3))
    assert portion.batches == []
    assert portion.held_out_from == 0
    assert len(portion.shares) == 2
