"""torch's own int4 matmul for CPUs, used where it is faster: few tokens, 4 bit.

It takes bf16 activations and bf16 (scale, offset) pairs, so results carry bf16 rounding (about 2e-3 relative).
float16 or float32 activations would fall into a scalar loop 15 to 60 times slower: they are cast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from llmq_kernels.layout import PackedWeight, unpack

_GROUPS = (32, 64, 128, 256)
_ROWS = 16  # the operator wants rows in multiples of this: others are zeros, cut off afterwards
_CODES = 1 << 20  # rearranged at a time


@dataclass(frozen=True)
class CpuInt4Weight:
    """A 4-bit weight in the private layout of aten::_weight_int4pack_mm_for_cpu."""

    packed: UInt8[Tensor, "padded_out half_in"]
    scale_offset: BFloat16[Tensor, "groups padded_out 2"]
    """w = (code - 8) * scale + offset"""
    group_size: int
    out_features: int


def supports(weight: PackedWeight) -> bool:
    """Tell if this path accepts the layer."""
    return weight.device.type == "cpu" and weight.bits == 4 and weight.group_size in _GROUPS


def prepare(weight: PackedWeight) -> CpuInt4Weight:
    """Rearrange a weight for this CPU; `supports` must hold. Return the new weight."""
    # The operator takes four bytes a code. Its layout is one block of 16, 32 or 64 rows after the other.
    step = max(1, _CODES // (64 * weight.in_features)) * 64
    rows, more = weight.out_features, -weight.out_features % _ROWS
    strips = (unpack(weight, at, at + step).to(torch.int32) for at in range(0, rows, step))
    strips = (pad(codes, (0, 0, 0, -len(codes) % _ROWS)) for codes in strips)
    packed = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for codes in strips])
    scale = weight.scale()
    offset = (8 - weight.zero().float()) * scale
    pairs = pad(torch.stack([scale, offset], dim=-1).transpose(0, 1), (0, 0, 0, more)).contiguous().to(torch.bfloat16)
    return CpuInt4Weight(packed, pairs, weight.group_size, rows)


def matmul(
    x: Float[Tensor, "*batch in"], weight: CpuInt4Weight, bias: Tensor | None = None
) -> Float[Tensor, "*batch out"]:
    """Return x @ Wᵀ + bias, computed in bf16, in x's dtype. x has its features in the packed order."""
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight.packed, weight.group_size, weight.scale_offset)
    y = y[:, : weight.out_features].to(x.dtype).reshape(*x.shape[:-1], weight.out_features)
    return y if bias is None else y + bias
