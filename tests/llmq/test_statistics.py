import pytest
import torch
from torch import nn

from llmq.arch import Group
from llmq.clock import Clock
from llmq.statistics import collect_statistics
from llmq.stream import Block


class TwoLinears(nn.Module):
    """hidden -> a -> relu -> b"""

    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return self.b(self.a(hidden).relu())


def block_of(hidden, held_out_from, width=64, inner=320):
    torch.manual_seed(0)
    return Block("block", TwoLinears(width, inner), hidden, held_out_from, ((), {}), torch.device("cpu"))


def hidden_states(batches=3, width=64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 50, width, generator=generator) for _ in range(batches)]


GROUPS = [Group(("a",)), Group(("b",))]


@pytest.mark.parametrize(("width", "inner"), [(64, 320), (1, 257), (37, 511)])
def test_moments_equal_those_of_all_inputs_at_once(width, inner):
    hidden = hidden_states(width=width)
    block = block_of(hidden, 2, width, inner)
    for stats, X in zip(
        collect_statistics(block, GROUPS, Clock()),
        [hidden, [block.module.a(h).relu() for h in hidden]],
        strict=True,
    ):
        train, held_out = torch.cat(X[:2]).flatten(0, 1).double(), X[2].flatten(0, 1).double()
        assert torch.allclose(stats.H.double(), train.T @ train / 200, atol=1e-5)
        assert torch.allclose(stats.H_val.double(), held_out.T @ held_out / 100, atol=1e-5)
        assert torch.equal(stats.H, stats.H.T)
        assert torch.allclose(stats.mean_abs.double(), train.abs().mean(0), atol=1e-6)
        assert (stats.tokens, stats.dropped) == (200, 0)


def test_without_held_out_samples_the_same_moments_serve_both():
    stats = collect_statistics(block_of(hidden_states(), 3), GROUPS, Clock())[0]
    assert torch.equal(stats.H, stats.H_val)
    assert stats.tokens == 300


def test_rows_that_are_not_finite_are_dropped_and_counted():
    hidden = hidden_states()
    clean = collect_statistics(block_of([h.clone() for h in hidden], 2), GROUPS, Clock())[0]
    dirty = [torch.cat([h, torch.zeros(2, 2, 64)], dim=1) for h in hidden]
    dirty[0][0, 50, 7], dirty[0][1, 51, 0], dirty[2][0, 51, 3] = torch.nan, torch.inf, -torch.inf
    stats = collect_statistics(block_of(dirty, 2), GROUPS, Clock())[0]
    assert stats.dropped == 3
    assert stats.tokens == 2 * 2 * 52 - 2
    assert torch.isfinite(stats.H).all()
    assert torch.allclose(stats.H * stats.tokens, clean.H * clean.tokens, rtol=1e-5, atol=1e-4)


def test_nothing_changes_with_the_number_of_threads():
    kept = torch.get_num_threads()
    try:
        moments = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            moments.append(collect_statistics(block_of(hidden_states(), 2), GROUPS[:1], Clock())[0].H)
    finally:
        torch.set_num_threads(kept)
    assert torch.equal(moments[0], moments[1])


def test_time_is_split_into_forward_and_statistics():
    clock = Clock()
    collect_statistics(block_of(hidden_states(), 2), GROUPS, clock)
    assert set(clock.seconds) == {"forward", "statistics"}
    assert clock.seconds["forward"] > 0
    assert clock.seconds["forward"] + clock.seconds["statistics"] <= clock.total
