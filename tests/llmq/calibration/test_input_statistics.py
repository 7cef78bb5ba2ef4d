import pytest
import torch
from problems import threads
from torch import nn

from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.input_statistics import collect_statistics
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, find_groups, linear_of


class TwoLinears(nn.Module):
    """hidden -> a -> relu -> b"""

    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return self.b(self.a(hidden).relu())


def block_of(hidden, held_out_from, width=64, inner=320):
    torch.manual_seed(0)
    return Block("block", TwoLinears(width, inner), hidden, held_out_from, ((), {}), Compute(torch.device("cpu")))


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


class Residual(nn.Module):
    """hidden + b(relu(a(norm(hidden)))), as decoder blocks have it."""

    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return hidden + self.b(self.a(self.norm(hidden)).relu())


def paired_block():
    torch.manual_seed(0)
    hidden = hidden_states()
    original = [h + 0.1 * torch.randn_like(h) for h in hidden]
    return Block("block", Residual(64, 96), hidden, 2, ((), {}), Compute(torch.device("cpu")), list(original)), original


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


@torch.no_grad()
def test_the_original_model_keeps_its_weights_when_the_block_gets_others():
    block, original = paired_block()
    groups = find_groups(block.module, block.run, block.hidden[0])
    outputs = [block.run(h) for h in original]
    collect_statistics(block, groups[:1], Clock(), last=False)
    assert all(torch.equal(out, before) for out, before in zip(block.original, original, strict=True))
    block.replace_weight("a", torch.zeros(96, 64))
    stats = collect_statistics(block, groups[1:], Clock())[0]
    assert not stats.H.any()  # b's input in this model
    assert all(torch.equal(out, expected) for out, expected in zip(block.original, outputs, strict=True))
    assert not block.module.a.weight.any()


def test_a_block_runs_no_further_than_the_last_input_that_is_wanted():
    block = block_of(hidden_states(), 2)
    calls = []
    block.module.b.register_forward_hook(lambda *_: calls.append("b"))
    collect_statistics(block, GROUPS, Clock())
    assert calls == []


class Two(nn.Module):
    """Two parts one after the other, each added to the residual stream, as attention and MLP are."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = TwoLinears(64, 96), TwoLinears(64, 96), nn.LayerNorm(64)

    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return hidden + self.second(self.norm(hidden))


def two_parts(hidden, original=None):
    """The block, and its groups."""
    block = Block("block", Two(), hidden, 2, ((), {}), Compute(torch.device("cpu")), original)
    return block, find_groups(block.module, block.run, hidden[0])


def round_one_by_one(block, groups):
    """Replace the weights of one group after the other, as quantizing does; returns the statistics on the way."""
    stats = []
    for group in groups:
        stats += collect_statistics(block, [group], Clock(), last=group is groups[-1])
        block.replace_weight(group.linears[0], linear_of(block.module, group.linears[0]).weight.round(decimals=1))
    return stats


@torch.no_grad()
def test_parts_that_end_with_a_linear_run_once_and_everything_is_as_if_they_ran_each_time():
    results, runs = [], []
    for keeps in (False, True):
        torch.manual_seed(0)
        hidden = hidden_states()
        original = [h + 0.1 * torch.randn_like(h) for h in hidden]
        block, groups = two_parts(hidden, original)
        if keeps:
            block.expect(groups)
        calls = []
        for part in (block.module.first, block.module.second):
            part.a.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        stats = round_one_by_one(block, groups)
        outputs = [block.run_batch(i) for i in range(3)]
        results.append(
            [*outputs, *block.original, *(part for each in stats for part in (each.H, each.target_moment, each.H_val))]
        )
        runs.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # For 3 batches each: the first part for its own b, and, in this model and the original one, for both linears of
    # the second part, which runs for its own b and, in this model, once more at the end. Kept: never again.
    assert runs == [3 * (2 * 3 + 1 + 2 + 1), 3 * (2 + 2)]


@torch.no_grad()
def test_an_input_is_kept_only_when_everything_before_it_is_replaced():
    hidden = hidden_states()
    block, groups = two_parts(hidden)
    groups = [group for group in groups if group.linears != ("second.a",)]
    block.expect(groups)
    collect_statistics(block, groups, Clock())  # of all groups at once
    for group in groups:
        block.replace_weight(group.linears[0], linear_of(block.module, group.linears[0]).weight.round(decimals=1))
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 3 * 2 * 50 * 96 * 4, 1 << 30])
def test_what_does_not_fit_is_computed_again(most, monkeypatch):
    monkeypatch.setattr("llmq.calibration.block_runner.MOST_KEPT", most)
    hidden = hidden_states()
    block, groups = two_parts(hidden, list(hidden))
    block.expect(groups)
    round_one_by_one(block, groups)
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["first.b", "second.a"])
def test_a_weight_replaced_once_more_changes_what_the_block_gives(name):
    hidden = hidden_states()
    block, groups = two_parts(hidden, list(hidden))
    block.expect(groups)
    round_one_by_one(block, groups)
    block.replace_weight(name, -linear_of(block.module, name).weight)
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))
