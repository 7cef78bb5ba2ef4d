"""What a block keeps between its runs changes how often submodules run, and nothing else."""

import pytest
import torch
from blocks import CPU, TwoLinears, hidden_states
from torch import nn

from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import collect_statistics
from llmq.calibration.kept_inputs import KeptInputs
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, Submodule, find_groups, linear_of


class TwoSubmodules(nn.Module):
    """Two submodules one after the other, each added to the residual stream, as attention and MLP are."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = TwoLinears(64, 96), TwoLinears(64, 96), nn.LayerNorm(64)

    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return hidden + self.second(self.norm(hidden))


def block_and_groups(hidden, original=None):
    """Return a block of two submodules, and its groups."""
    block = Block("block", TwoSubmodules(), hidden, 2, ((), {}), CPU, original)
    return block, find_groups(block.module, block.run, hidden[0])


def round_one_by_one(block, groups):
    """Replace the weights of one group after the other, as quantizing does; returns the statistics on the way."""
    stats = []
    for group in groups:
        stats += collect_statistics(block, [group], Clock(), last=group is groups[-1])
        block.replace_weight(group.linears[0], linear_of(block.module, group.linears[0]).weight.round(decimals=1))
    return stats


@torch.no_grad()
def test_submodules_that_end_with_a_linear_run_once_and_everything_is_as_if_they_ran_each_time():
    results, runs = [], []
    for keeps in (False, True):
        torch.manual_seed(0)
        hidden = hidden_states()
        original = [h + 0.1 * torch.randn_like(h) for h in hidden]
        block, groups = block_and_groups(hidden, original)
        if keeps:
            block.expect([[group] for group in groups])
        calls = []
        for submodule in (block.module.first, block.module.second):
            submodule.a.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        stats = round_one_by_one(block, groups)
        outputs = [block.run_batch(i) for i in range(3)]
        results.append(
            [*outputs, *block.original, *(moment for s in stats for moment in (s.H, s.target_moment, s.H_val))]
        )
        runs.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # For each of 3 batches. Without keeping, the first submodule runs in both models for its own b and for both linears
    # of the second one, and once at the end. The second one runs in both models for its own b, and once at the end.
    # With keeping, each of the two runs once in each model.
    assert runs == [3 * (2 * 3 + 1 + 2 + 1), 3 * (2 + 2)]


@torch.no_grad()
def test_an_input_is_kept_only_when_everything_before_it_is_replaced():
    hidden = hidden_states()
    block, groups = block_and_groups(hidden)
    groups = [group for group in groups if group.linears != ("second.a",)]
    block.expect([[group] for group in groups])
    collect_statistics(block, groups, Clock())  # of all groups at once
    for group in groups:
        block.replace_weight(group.linears[0], linear_of(block.module, group.linears[0]).weight.round(decimals=1))
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 3 * 2 * 50 * 96 * 4, 1 << 30])
def test_what_does_not_fit_is_computed_again(most, monkeypatch):
    monkeypatch.setattr("llmq.calibration.kept_inputs._MOST_KEPT", most)
    hidden = hidden_states()
    block, groups = block_and_groups(hidden, list(hidden))
    block.expect([[group] for group in groups])
    round_one_by_one(block, groups)
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["first.b", "second.a"])
def test_a_weight_replaced_once_more_changes_what_the_block_gives(name):
    hidden = hidden_states()
    block, groups = block_and_groups(hidden, list(hidden))
    block.expect([[group] for group in groups])
    round_one_by_one(block, groups)
    block.replace_weight(name, -linear_of(block.module, name).weight)
    assert all(torch.equal(block.run_batch(i), block.run(hidden[i])) for i in range(3))


def counted(kept, module, hidden, original=False, i=0):
    """Run the block once, check its output, and return how often its linears a and b ran."""
    expected, calls = module(hidden), {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    handles = [getattr(module.inner, name).register_forward_hook(lambda *_, name=name: count(name)) for name in calls]
    with kept.used(i, original):
        output = module(hidden)
    for handle in handles:
        handle.remove()
    assert torch.equal(output, expected)
    assert "forward" not in vars(module.inner)
    return calls["a"], calls["b"]


RUNS_ALL, RUNS_LAST, RUNS_NOTHING = (1, 1), (0, 1), (0, 0)


class OneSubmodule(nn.Module):
    """A block with one submodule, which returns a tuple as attention does."""

    def __init__(self, returns=None):
        super().__init__()
        self.inner = TwoLinears(64, 96)
        if returns is not None:
            self.inner.register_forward_hook(
                lambda _, args, output: output if isinstance(output, tuple) else (output, *[None] * (returns - 1))
            )

    def forward(self, hidden):
        output = self.inner(hidden)
        return hidden + (output[0] if isinstance(output, tuple) else output)


def expecting(returns=None, residual=None):
    """Return a block whose linears a and b will be replaced in turn, and what it keeps."""
    torch.manual_seed(0)
    module = OneSubmodule(returns)
    kept = KeptInputs(module, torch.device("cpu"))
    ends = Submodule("inner", returns)
    kept.expect([[Group(("inner.a",), residual=residual)], [Group(("inner.b",), ends=ends)]])
    return kept, module


def replace(kept, module, name):
    """Round the weight of a linear, and tell so."""
    weight = linear_of(module, name).weight
    weight.data = weight.data.round(decimals=1)
    kept.replaced(name)


@torch.no_grad()
@pytest.mark.parametrize("returns", [None, 1, 2])
def test_a_kept_input_passes_through_its_states_in_order(returns):
    (kept, module), hidden = expecting(returns), hidden_states()[0]
    assert counted(kept, module, hidden) == RUNS_ALL  # unknown: a is still to be replaced
    assert counted(kept, module, hidden) == RUNS_ALL
    replace(kept, module, "inner.a")
    assert counted(kept, module, hidden) == RUNS_ALL  # now the input is kept
    assert counted(kept, module, hidden) == RUNS_LAST
    assert counted(kept, module, hidden, i=1) == RUNS_ALL  # another micro-batch has states of its own
    assert counted(kept, module, hidden, original=True) == RUNS_ALL  # so has the original model
    replace(kept, module, "inner.b")
    assert counted(kept, module, hidden) == RUNS_LAST  # the last run: dropped
    assert counted(kept, module, hidden) == RUNS_ALL


@torch.no_grad()
def test_the_original_model_does_not_wait_for_replacements_and_has_no_run_at_the_end():
    (kept, module), hidden = expecting(), hidden_states()[0]
    runs = [counted(kept, module, hidden, original=True) for _ in range(3)]
    assert runs == [RUNS_ALL, RUNS_LAST, RUNS_NOTHING]
    kept.replaced("inner.a")
    assert counted(kept, module, hidden, original=True) == RUNS_NOTHING  # the last run: dropped
    assert counted(kept, module, hidden, original=True) == RUNS_ALL


@torch.no_grad()
@pytest.mark.parametrize("by", ["forget", "a second replacement"])
def test_all_is_unknown_again_after(by):
    (kept, module), hidden = expecting(), hidden_states()[0]
    replace(kept, module, "inner.a")
    counted(kept, module, hidden)
    assert counted(kept, module, hidden) == RUNS_LAST
    kept.forget() if by == "forget" else replace(kept, module, "inner.a")
    assert counted(kept, module, hidden) == RUNS_ALL
    assert counted(kept, module, hidden) == RUNS_LAST


@torch.no_grad()
def test_a_submodule_with_a_residual_that_is_wanted_inside_it_always_runs():
    (kept, module), hidden = expecting(residual="inner.a"), hidden_states()[0]
    replace(kept, module, "inner.a")
    assert [counted(kept, module, hidden) for _ in range(2)] == [RUNS_ALL, RUNS_ALL]


@torch.no_grad()
@pytest.mark.parametrize(("room", "runs"), [(0, RUNS_LAST), (-1, RUNS_ALL)])
def test_an_input_is_kept_if_it_fits_to_the_byte(room, runs, monkeypatch):
    monkeypatch.setattr("llmq.calibration.kept_inputs._MOST_KEPT", 2 * 50 * 96 * 4 + room)
    (kept, module), hidden = expecting(), hidden_states()[0]
    replace(kept, module, "inner.a")
    counted(kept, module, hidden)
    assert counted(kept, module, hidden) == runs


@torch.no_grad()
def test_a_run_that_fails_leaves_the_block_as_it_was():
    (kept, module), hidden = expecting(), hidden_states()[0]
    replace(kept, module, "inner.a")
    counted(kept, module, hidden)
    with pytest.raises(KeyboardInterrupt), kept.used(0, False):
        raise KeyboardInterrupt
    assert "forward" not in vars(module.inner)
    assert not module.inner.b._forward_pre_hooks
