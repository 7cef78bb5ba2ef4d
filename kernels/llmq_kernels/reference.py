"""Dequantize and multiply in plain torch: the oracle for every kernel, and the path that runs everywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

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


def _dequantize_rows(weight: PackedWeight, dtype: torch.dtype, start: int, stop: int) -> Float[Tensor, "rows in"]:
    codes = unpack(weight, start, stop).unflatten(1, (-1, weight.group_size)).to(dtype)
    scale = weight.scale()[start:stop, :, None].to(dtype)
    zero = weight.zero()[start:stop, :, None].to(dtype) if not weight.symmetric else 2 ** (weight.bits - 1)
    return codes.sub_(zero).mul_(scale).flatten(1)
