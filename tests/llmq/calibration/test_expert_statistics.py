"""Each expert has statistics of its own tokens, weighted by its scores; the layer has those of all."""

from dataclasses import replace

import pytest
import torch
from blocks import CPU, hidden_states
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llmq.calibration.block_runner import Block
from llmq.calibration.expert_statistics import ExpertStatistics
from llmq.core.timing import Clock
from llmq.models.block_structure import find_groups
from llmq.models.experts import activated, experts_to_linears

WIDTH, INNER, EXPERTS = 64, 96, 6


class Mixture(nn.Module):
    """hidden + experts(norm(hidden)); the last expert is never chosen."""

    def __init__(self):
        super().__init__()
        config = MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS)
        config._experts_implementation = "eager"
        self.norm, self.mlp = nn.LayerNorm(WIDTH), MixtralSparseMoeBlock(config)
        experts_to_linears(self)
        self.mlp.experts.to_empty(device="cpu")
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.mlp.gate.weight.data[-1] = 0
        self.mlp.gate.weight.data[:-1, 0] = 9.0  # channel 0 is always positive: all others win
        self.requires_grad_(False)

    def forward(self, hidden):
        return hidden + self.mlp(self.entering(hidden))

    def entering(self, hidden):
        X = self.norm(hidden).clone()
        X[..., 0] = 1 + X[..., 0].abs()
        return X


def mixture(original=False):
    torch.manual_seed(0)
    hidden = hidden_states(4)
    other = [h + 0.05 * torch.randn_like(h) for h in hidden] if original else None
    return Block("block", Mixture(), hidden, 3, ((), {}), CPU, other)


def groups_of(block):
    return [g for g in find_groups(block.module, block.run, block.sample) if g.expert is not None]


def statistics_of(block, all_tokens=False, after_each=lambda _: None):
    """Return the statistics of each group, by the name of its first linear."""
    groups, found = groups_of(block), {}
    statistics = ExpertStatistics(block, groups, Clock(), all_tokens=all_tokens)
    for group in groups:
        found[group.linears[0].removeprefix("mlp.experts.")] = statistics.of(group)
        after_each(group)
    return found


def own_moments(module, hidden, expert, last):
    """Return Σ s² x xᵀ / Σ s² and the number of tokens, for what enters an expert or its last linear."""
    X = torch.cat([module.entering(h).flatten(0, 1) for h in hidden])
    _, scores, index = module.mlp.gate(X)
    token, place = torch.nonzero(index == expert, as_tuple=True)
    X, s = X[token], scores[token, place, None].double()
    X = (activated(module.mlp.experts, expert, X) if last else X).double()
    return ((X * s).T @ (X * s)) / s.square().sum(), len(X)


@pytest.mark.parametrize("last", [False, True])
def test_the_moments_are_those_of_the_experts_own_tokens_weighted_by_their_scores(last):
    block = mixture()
    found = statistics_of(block)
    for e in range(EXPERTS):
        stats = found[f"{e}.down_proj" if last else f"{e}.gate_proj"]
        for hidden, H in ((block.hidden[:3], stats.H), (block.hidden[3:], stats.H_val)):
            expected, tokens = own_moments(block.module, hidden, e, last)
            if e < EXPERTS - 1:
                torch.testing.assert_close(H.double(), expected, rtol=1e-4, atol=1e-5)
            else:
                assert tokens == 0
                assert not H.any()


def test_the_layers_moments_are_those_of_all_experts_together():
    block = mixture()
    groups = groups_of(block)
    statistics = ExpertStatistics(block, groups, Clock())
    every = [own_moments(block.module, block.hidden[:3], e, last=True) for e in range(EXPERTS - 1)]
    X = torch.cat([block.module.entering(h).flatten(0, 1) for h in block.hidden[:3]])
    _, scores, index = block.module.mlp.gate(X)
    weights = [scores[index == e].double().square().sum() for e in range(EXPERTS - 1)]
    after = sum(w * H for w, (H, _) in zip(weights, every, strict=True)) / sum(weights)
    torch.testing.assert_close(statistics.layer(groups[1]).H.double(), after, rtol=1e-4, atol=1e-5)
    s = scores.square().sum(1, keepdim=True).sqrt()
    before = ((X * s).T @ (X * s)) / s.square().sum()
    torch.testing.assert_close(statistics.layer(groups[0]).H, before, rtol=1e-4, atol=1e-5)
    assert statistics.tokens(held_out=False) == [n for _, n in every] + [0]
    assert sum(statistics.tokens(held_out=True)) == 2 * 100


def test_the_last_linear_sees_what_the_rounded_ones_before_it_compute():
    block = mixture()

    def zero(group):
        if len(group.linears) == 2:
            block.replace_weight(group.linears[1], torch.zeros(INNER, WIDTH))

    found = statistics_of(block, after_each=zero)
    assert not found["0.down_proj"].H.any()
    assert found["0.gate_proj"].H.any()


def test_every_expert_runs_on_every_token_if_asked():
    found = statistics_of(mixture(), all_tokens=True)
    assert {stats.tokens for stats in found.values()} == {300}
    assert torch.equal(found["0.gate_proj"].H, found["5.gate_proj"].H)


def test_a_share_of_another_process_has_no_rows_in_whatever_dtype_a_gpu_computes():
    block = mixture(original=True)
    compute = replace(CPU, dtype=torch.bfloat16)
    hidden, original = ([h.bfloat16() for h in states] for states in (block.hidden, block.original))
    shares = [*block.shares, replace(block.shares[0], batches=range(0))]
    found = statistics_of(
        Block("block", block.module.bfloat16(), hidden, 3, ((), {}), compute, original, shares=shares)
    )
    assert sum(stats.tokens for name, stats in found.items() if name.endswith("gate_proj")) == 2 * 300
    assert all(torch.isfinite(stats.target_moment).all() for stats in found.values())


def test_an_expert_without_tokens_has_no_target():
    found = statistics_of(mixture(original=True))
    assert found["0.gate_proj"].target_moment.any()
    unused = found[f"{EXPERTS - 1}.gate_proj"]
    assert not unused.target_moment.any()
    assert torch.isfinite(unused.H).all()


def test_the_target_of_an_expert_is_that_of_its_tokens():
    block = mixture(original=True)
    hidden, original = list(block.hidden), list(block.original)
    W = torch.cat([getattr(block.module.mlp.experts.get_submodule("0"), n).weight for n in ("gate_proj", "up_proj")])
    X, X_o = (torch.cat([block.module.entering(h).flatten(0, 1) for h in states[:3]]) for states in (hidden, original))
    _, scores, index = block.module.mlp.gate(X)
    token, place = torch.nonzero(index == 0, as_tuple=True)
    s = scores[token, place, None]
    T = (X_o - X)[token] @ W.T
    expected = (T * s).T @ (X[token] * s) / s.square().sum()
    stats = statistics_of(block)["0.gate_proj"]
    torch.testing.assert_close(stats.target_moment, expected, rtol=1e-3, atol=1e-4)


def test_the_original_model_leaves_the_block_when_it_has_run():
    block = mixture(original=True)
    expected = [block.module(h) for h in block.original]
    statistics_of(block)
    for leaving, h in zip(block.original, expected, strict=True):
        torch.testing.assert_close(leaving, h)


def test_the_last_linears_target_holds_what_the_block_lacks_over_the_sum_of_scores():
    block = mixture(original=True)
    gate = block.module.mlp.gate
    gate.forward = lambda X, forward=gate.forward: (lambda logits, s, index: (logits, 2 * s, index))(*forward(X))
    hidden, original = (torch.cat([h.flatten(0, 1) for h in states[:3]]) for states in (block.hidden, block.original))
    W = block.module.mlp.experts.get_submodule("0").down_proj.weight
    X, X_o = (block.module.entering(states) for states in (hidden, original))
    _, scores, index = block.module.mlp.gate(X)
    token, place = torch.nonzero(index == 0, as_tuple=True)
    inner, inner_o = (activated(block.module.mlp.experts, 0, each[token]) for each in (X, X_o))
    s = scores[token, place, None]
    T = (inner_o - inner) @ W.T + (original - hidden)[token] / 2
    expected = (T * s).T @ (inner * s) / s.square().sum()
    stats = statistics_of(block)["0.down_proj"]
    torch.testing.assert_close(stats.target_moment, expected, rtol=1e-3, atol=1e-4)
