"""Each expert has statistics of its own tokens, and borrows as much from the layer as they are few."""

import pytest
import torch
from blocks import CPU, hidden_states
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llmq.calibration.block_runner import Block
from llmq.calibration.expert_statistics import ExpertStatistics, _borrowed
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


def statistics_of(block, kind="routed", first=None):
    """Return the statistics of each group, by the name of its first linear."""
    groups = [g for g in find_groups(block.module, block.run, block.sample) if g.expert is not None]
    statistics, found = ExpertStatistics(block, groups, Clock(), last=True, kind=kind), {}
    for group in groups:
        found[group.linears[0].removeprefix("mlp.experts.")] = statistics.of(group)
        if first is not None:
            first(group)
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
def test_what_is_not_borrowed_is_the_moment_of_the_experts_own_tokens(last):
    block = mixture()
    found = statistics_of(block)
    experts = [own_moments(block.module, block.hidden[:3], e, last) for e in range(EXPERTS)]
    layers = []
    for e, (H, tokens) in enumerate(experts[:-1]):
        stats = found[f"{e}.down_proj" if last else f"{e}.gate_proj"]
        assert stats.tokens == tokens > 0
        assert 0 < stats.borrowed < 1
        layers.append((stats.H.double() - (1 - stats.borrowed) * H) / stats.borrowed)
    for layer in layers:  # what is borrowed is the same for all: the layer's
        torch.testing.assert_close(layer, layers[0], rtol=1e-3, atol=1e-3)
    unused = found[f"{EXPERTS - 1}.down_proj" if last else f"{EXPERTS - 1}.gate_proj"]
    assert (unused.tokens, unused.borrowed) == (0, 1.0)
    torch.testing.assert_close(unused.H.double(), layers[0], rtol=1e-3, atol=1e-3)


def test_the_layers_moment_is_that_of_all_experts_together():
    block = mixture()
    H = statistics_of(block, "layer")["0.gate_proj"].H
    X = torch.cat([block.module.entering(h).flatten(0, 1) for h in block.hidden[:3]])
    s = block.module.mlp.gate(X)[1].square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(H, ((X * s).T @ (X * s)) / s.square().sum(), rtol=1e-4, atol=1e-5)


def test_the_last_linear_sees_what_the_rounded_ones_before_it_compute():
    block = mixture()

    def zero(group):
        if len(group.linears) == 2:
            block.replace_weight(group.linears[1], torch.zeros(INNER, WIDTH))

    found = statistics_of(block, "all-tokens", zero)
    assert not found["0.down_proj"].H.any()
    assert found["0.gate_proj"].H.any()


def test_every_expert_runs_on_every_token_if_asked():
    found = statistics_of(mixture(), "all-tokens")
    assert {stats.tokens for stats in found.values()} == {300}
    assert torch.equal(found["0.gate_proj"].H, found["5.gate_proj"].H)


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
    torch.testing.assert_close(stats.target_moment, (1 - stats.borrowed) * expected, rtol=1e-3, atol=1e-4)


def test_the_original_model_leaves_the_block_when_it_has_run():
    block = mixture(original=True)
    expected = [block.module(h) for h in block.original]
    statistics_of(block)
    for leaving, h in zip(block.original, expected, strict=True):
        torch.testing.assert_close(leaving, h)


def sampled(counts, spread, seed):
    """Return second moments of experts whose true ones differ by `spread`, from so many samples, and the true ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.diag(torch.linspace(0.2, 2, 24, dtype=torch.float64))
    moments, true = [], []
    for count in counts:
        A = shape + spread * torch.randn(24, 24, generator=generator, dtype=torch.float64)
        X = torch.randn(count, 24, generator=generator, dtype=torch.float64) @ A
        X_val = torch.randn(max(4, count // 9), 24, generator=generator, dtype=torch.float64) @ A
        moments.append((X.T @ X / count, X_val.T @ X_val / len(X_val), len(X_val)))
        true.append(A.T @ A)
    return moments, true


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.4])
def test_what_is_borrowed_is_nearly_the_best_share_whether_experts_are_alike_or_not(spread):
    counts = [20, 30, 45, 70, 100, 150, 220, 330]
    moments, true = sampled(counts, spread, 0)
    own, own_val = (torch.stack([m[i] for m in moments]) for i in (0, 1))
    n, v = torch.tensor(counts, dtype=torch.float64), torch.tensor([float(m[2]) for m in moments])
    layer, layer_val = ((w[:, None, None] * M).sum(0) / w.sum() for w, M in ((n, own), (v, own_val)))
    borrowed, _ = _borrowed(own, n, own_val, v, layer, layer_val)

    def error(shares):
        size = layer.diagonal().sqrt()
        scale = torch.outer(size, size)
        return sum(
            (((1 - share) * H + share * layer - M) / scale).square().sum().item()
            for share, H, M in zip(shares, own, true, strict=True)
        )

    best = min(error([share / 50] * len(counts)) for share in range(51))
    if spread > 0.02:  # else nothing beats the layer's
        assert error(borrowed) < min(error([0.0] * len(counts)), error([1.0] * len(counts)))
    assert error(borrowed) < 1.2 * best  # nearly as good as the best share for all, which nobody knows beforehand
    assert borrowed[0] > borrowed[-1]
