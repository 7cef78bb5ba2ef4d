"""A linear layer that keeps its weight packed. The only file that knows the kernels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from llmq_kernels import PackedWeight, cpu_int4, dequantize, matmul, pack
from torch import Tensor, nn

from llmq.weight import QuantizedWeight

# Above this many tokens torch's int4 path loses to dequantizing once and multiplying in float32, which is also exact
# (2-core AVX-512 machine, torch 2.13, 2026-11-22, 1536x576: 0.69 against 1.08 ms at 64 tokens, 5.6 against 5.3 at 512).
_INT4_TOKENS = 64


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W = scale * (codes - zero), never stored dense.

    Args:
        weight: codes and grids of the layer.
        bias: [out] or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.group_of is not None:
            raise ValueError("act-order weights must have their columns sorted before they are packed")
        packed = pack(weight.q, weight.scale, weight.zero, weight.bits)
        self.bits, self.in_features, self.out_features = packed.bits, packed.in_features, packed.out_features
        self._planes = len(packed.planes)
        for i, plane in enumerate(packed.planes):
            self.register_buffer(f"plane{i}", plane)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero", packed.zero)
        self.register_buffer("bias", bias)
        self.bias: Tensor | None
        self.scale: Tensor
        self.zero: Tensor
        self._int4: cpu_int4.CpuInt4Weight | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moves and casts keep the scales exact: codes were rounded against these very values."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        self._int4 = None
        return self

    @property
    def packed(self) -> PackedWeight:
        """The buffers as the kernels take them."""
        planes = tuple(self.get_buffer(f"plane{i}") for i in range(self._planes))
        return PackedWeight(planes, self.scale, self.zero, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The dense weight, for checks and for export."""
        return dequantize(self.packed, dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.numel() <= _INT4_TOKENS * self.in_features and x.device.type == "cpu" and cpu_int4.supports(self.packed):
            if self._int4 is None:  # made at the first decode: evaluation never needs it
                self._int4 = cpu_int4.prepare(self.packed)
            return cpu_int4.matmul(x, self._int4, bias)
        return matmul(x, self.packed, bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.packed.group_size}"
