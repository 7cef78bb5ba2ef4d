"""Dequantize and multiply in plain torch: the oracle for every kernel, and the path that runs everywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from llmq_kernels.layout import PackedWeight, unpack

# Rows dequantized at a time: the float copy stays in cache and the layer is never dense in memory.
_CHUNK_ELEMENTS = 1 << 20


def dequantize(
    weight: PackedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> Float[Tensor, "rows in"]:
    """Rows start to stop as floats, computed in `dtype`."""
    codes = unpack(weight, start, stop).unflatten(1, (-1, weight.group_size)).to(dtype)
    scale, zero = weight.scale[start:stop, :, None].to(dtype), weight.zero[start:stop, :, None].to(dtype)
    return codes.sub_(zero).mul_(scale).flatten(1)


def matmul(
    x: Float[Tensor, "*batch in"], weight: PackedWeight, bias: Tensor | None = None
) -> Float[Tensor, "*batch out"]:
    """x @ Wᵀ + bias with W dequantized to x's dtype, a slice of rows at a time."""
    rows = max(1, _CHUNK_ELEMENTS // weight.in_features)
    slices = [
        linear(x, dequantize(weight, x.dtype, start, start + rows)) for start in range(0, weight.out_features, rows)
    ]
    y = slices[0] if len(slices) == 1 else torch.cat(slices, dim=-1)
    return y if bias is None else y + bias
