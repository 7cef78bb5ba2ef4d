"""Packed experts with known values, for the tests of mixtures."""

from dataclasses import replace

import torch
from llmq_kernels import stack_experts
from oracle import move, relative_error
from weights import some_weight


def experts_of(where, E, N, K, bits=4, group=64, symmetric=True, seed=0):
    """E experts on a device; group -1 is one group per row."""
    groups = 1 if group < 0 else K // group
    weights = stack_experts([some_weight(N, K, groups, bits, symmetric, seed=seed + e)[0] for e in range(E)])
    words = tuple(array.to(where[0]) for array in weights.words)
    return replace(weights, words=words, grid=weights.grid.to(where[0]))


def some_tokens(where, rows, K, seed=0):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(*where)


def some_routing(T, k, E, seed=0):
    """Index [T, k] of k different experts for each token; the first ones have the most tokens, some may have none."""
    generator = torch.Generator().manual_seed(seed)
    favoured = torch.rand(T, E, generator=generator) - torch.linspace(0, 1, E)
    return favoured.topk(k).indices


def some_bias_and_scores(where, index, E, N, seed=0):
    generator = torch.Generator().manual_seed(seed + 7)
    bias, scores = torch.randn(E, N, generator=generator), torch.rand(index.shape, generator=generator)
    return bias.to(*where), scores.to(where[0])


def error_of(y, x, weights, index, bias=None, scores=None):
    """The largest relative error of an expert's outputs against float64."""
    index, x, y = index.cpu(), x.cpu(), y.double().cpu()
    if scores is not None:
        y = y / scores.double().cpu()[..., None]
    y, pairs, share = y.flatten(0, 1), index.flatten(), index.numel() // len(x)
    errors = []
    for e in pairs.unique().tolist():
        mine = (pairs == e).nonzero().flatten()
        one = move(weights.expert(e), "cpu")
        x_e = x[mine // share]
        if one.permutation is not None:
            x_e = x_e[:, one.permutation]
        errors.append(relative_error(y[mine], x_e, one, None if bias is None else bias[e]))
    return max(errors)
