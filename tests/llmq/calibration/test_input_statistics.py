"""Statistics of a group's inputs are those of all tokens at once."""

import pytest
import torch
from blocks import block_of, hidden_states, paired_block
from problems import threads

from llmq.calibration.input_statistics import collect_statistics
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, find_groups

GROUPS = [Group(("a",)), Group(("b",))]


@pytest.mark.parametrize(("width", "inner"), [(64, 320), (1, 257), (37, 511)])
def test_moments_equal_those_of_all_inputs_at_once(width, inner):
    hidden = hidden_states(width=width)
    block = block_of(hidden, 2, width, inner)
    for stats, X in zip(
        collect_statistics(block, GROUPS, Clock(), magnitudes=True),
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
    moments = []
    for count in (1, 2):
        with threads(count):
            moments.append(collect_statistics(block_of(hidden_states(), 2), GROUPS[:1], Clock())[0].H)
    assert torch.equal(moments[0], moments[1])


def test_time_is_split_into_forward_and_statistics():
    clock = Clock()
    collect_statistics(block_of(hidden_states(), 2), GROUPS, clock)
    assert set(clock.seconds) == {"forward", "statistics"}
    assert clock.seconds["forward"] > 0
    assert clock.seconds["forward"] + clock.seconds["statistics"] <= clock.total


def inputs_of(block, hidden):
    a_in = block.module.norm(hidden)
    b_in = block.module.a(a_in).relu()
    return {block.module.a: a_in.flatten(0, 1), block.module.b: b_in.flatten(0, 1)}


@torch.no_grad()
def test_differences_from_the_original_model_are_those_of_all_tokens_at_once():
    block, original = paired_block()
    groups = find_groups(block.module, block.run, block.hidden[0])
    assert groups == [Group(("a",), "norm", 0.0), Group(("b",), residual="")]
    outputs = [block.run(h) for h in original]
    for stats, linear, residual in zip(
        collect_statistics(block, groups, Clock()), (block.module.a, block.module.b), (0, 1), strict=True
    ):
        assert linear.out_features != linear.in_features
        for rows, target_moment in ((slice(0, 2), stats.target_moment), (slice(2, 3), stats.target_moment_val)):
            X = torch.cat([inputs_of(block, h)[linear] for h in block.hidden[rows]])
            X_o = torch.cat([inputs_of(block, h)[linear] for h in original[rows]])
            dR = torch.cat([o - h for o, h in zip(original, block.hidden, strict=True)][rows]).flatten(0, 1)
            T = (X_o - X) @ linear.weight.T + (dR if residual else 0)
            torch.testing.assert_close(target_moment, T.T @ X / len(X), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(out, expected) for out, expected in zip(block.original, outputs, strict=True))


def test_a_block_runs_no_further_than_the_last_input_that_is_wanted():
    block = block_of(hidden_states(), 2)
    calls = []
    block.module.b.register_forward_hook(lambda *_: calls.append("b"))
    collect_statistics(block, GROUPS, Clock())
    assert calls == []
