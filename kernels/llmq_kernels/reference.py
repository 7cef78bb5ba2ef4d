"""Dequantize and multiply in plain torch: the oracle for every kernel, and the path that runs everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from llmq_kernels.experts import ExpertWeights
from llmq_kernels.layout import PackedWeight, unpack

# Rows dequantized at a time: the float copy stays in cache and the layer is never dense in memory.
_CHUNK_ELEMENTS = 1 << 20


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Return the dense weight, computed in `dtype`, with columns in the order of the inputs."""
    W = _dequantize_rows(weight, dtype, 0, weight.out_features)
    return W if weight.permutation is None else W[:, torch.argsort(weight.permutation)]


def matmul(
    x: Float[Tensor, "*batch in"], weight: PackedWeight, bias: Tensor | None = None
) -> Float[Tensor, "*batch out"]:
    """Return x @ Wᵀ + bias with W dequantized to x's dtype, a slice of rows at a time."""
    x = permuted(x, weight)
    rows = max(1, _CHUNK_ELEMENTS // weight.in_features)
    slices = [
        linear(x, _dequantize_rows(weight, x.dtype, start, start + rows))
        for start in range(0, weight.out_features, rows)
    ]
    y = slices[0] if len(slices) == 1 else torch.cat(slices, dim=-1)
    return y if bias is None else y + bias


def permuted(x: Float[Tensor, "*batch in"], weight: PackedWeight) -> Float[Tensor, "*batch in"]:
    """Return x with its features in the order of the weight's columns."""
    return x if weight.permutation is None else x.index_select(-1, weight.permutation)


def routed_matmul(
    x: Float[Tensor, "rows in"],
    weights: ExpertWeights,
    index: Int[Tensor, "tokens k"],
    bias: Float[Tensor, "experts out"] | None = None,
    scores: Float[Tensor, "tokens k"] | None = None,
    multiply: Callable[[Tensor, PackedWeight, Tensor | None], Tensor] = matmul,
) -> Float[Tensor, "tokens k out"]:
    """Return scores[t, j] * (x[t] @ Wᵀ + bias) of expert index[t, j], one expert after another.

    Args:
        x: a row for each token, or one for each of its k choices too.
        multiply: computes x @ Wᵀ + bias, for experts that have tokens only.

    Raises ValueError for an expert that does not exist.
    """
    pairs, share = index.flatten(), index.numel() // max(1, len(x))
    y = x.new_empty(len(pairs), weights.out_features)
    for e in pairs.unique().tolist():
        if not 0 <= e < len(weights):
            raise ValueError(f"there is no expert {e}: there are {len(weights)}")
        mine = (pairs == e).nonzero().flatten()
        y[mine] = multiply(x[mine // share], weights.expert(e), None if bias is None else bias[e])
    y = y.unflatten(0, index.shape)
    return y if scores is None else (y * scores[..., None]).to(x.dtype)


def _dequantize_rows(weight: PackedWeight, dtype: torch.dtype, start: int, stop: int) -> Float[Tensor, "rows in"]:
    codes = unpack(weight, start, stop).unflatten(1, (-1, weight.group_size)).to(dtype)
    scale = weight.scale()[start:stop, :, None].to(dtype)
    zero = weight.zero()[start:stop, :, None].to(dtype) if not weight.symmetric else 2 ** (weight.bits - 1)
    return codes.sub_(zero).mul_(scale).flatten(1)
