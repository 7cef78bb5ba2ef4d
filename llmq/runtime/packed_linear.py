"""A linear layer that keeps its weight packed. It and `llmq.tune` alone know the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from llmq_kernels import PackedWeight, cpu_int4, dequantize, new_counters, pack, packed_linear, reference, stack
from llmq_kernels.layout import unpack
from torch import Tensor, nn

from llmq.core.errors import RequestError
from llmq.core.quantized_weight import QuantizedWeight

# Above this many tokens torch's int4 path loses to dequantizing once and multiplying in float32, which is also exact
# (2-core AVX-512 machine, torch 2.13, 2026-11-22, 1536x576: 0.69 against 1.08 ms at 64 tokens, 5.6 against 5.3 at 512).
_INT4_TOKENS = 64


@dataclass(frozen=True)
class _Origin:
    """What the layout does not tell of the weight it was made of."""

    dtype: torch.dtype = torch.float32
    """Of the scales."""
    parts: tuple[int, ...] | None = None
    """How many groups each of its groups was cut into; None where none was."""
    lossless: bool = True


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W = scale * (codes - zero), never stored dense.

    Args:
        packed: the weight as the kernels want it.
        bias: [out] or None.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.symmetric = packed.bits, packed.group_size, packed.symmetric
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._arrays = len(packed.words)
        for i, words in enumerate(packed.words):
            self.register_buffer(f"words{i}", words)
        self.register_buffer("grid", packed.grid)
        self.register_buffer("permutation", packed.permutation)
        self.register_buffer("bias", bias)
        self.register_buffer("counters", new_counters(packed.device), persistent=False)
        self.grid: Tensor
        self.permutation: Tensor | None
        self.bias: Tensor | None
        self.counters: Tensor
        self._int4: cpu_int4.CpuInt4Weight | None = None
        self._origin = _Origin()

    @classmethod
    def from_codes(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
        """Lay out the codes and grids of a layer. Groups of several sizes are cut into groups of one."""
        even = weight.even()
        packed = pack(even.q, even.scale, even.zero, even.bits, even.group_of)
        linear = cls(packed, bias)
        parts = None
        if even.scale.shape != weight.scale.shape and weight.group_of is not None:
            sizes = torch.bincount(weight.group_of, minlength=weight.scale.shape[1])
            parts = tuple((sizes // even.group_size).tolist())
        lossless = torch.equal(packed.scale(), even.scale.float()) and 0 not in (parts or ())
        linear._origin = _Origin(weight.scale.dtype, parts, lossless)
        return linear

    @classmethod
    def stack(cls, linears: Sequence[PackedLinear]) -> PackedLinear | None:
        """One layer with the rows of several, or None if they do not fit together."""
        packed = stack([linear.packed for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if packed is None or len(biases) not in (0, len(linears)):
            return None
        return cls(packed, torch.cat(biases) if biases else None)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """What a device needs beside the weight is made anew after a move."""
        super()._apply(fn, recurse)
        self.counters = new_counters(self.grid.device)
        self._int4 = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._int4 = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the int4 copy: its layout depends on this very CPU."""
        return self.__dict__ | {"_int4": None}

    @property
    def packed(self) -> PackedWeight:
        """The buffers as the kernels take them."""
        words = tuple(self.get_buffer(f"words{i}") for i in range(self._arrays))
        return PackedWeight(
            words, self.grid, self.bits, self.group_size, self.in_features, self.symmetric, self.permutation
        )

    def codes(self) -> QuantizedWeight:
        """The weight that `from_codes` was given, exactly.

        Raises RequestError where the layout could not keep it: the last digits of float32 scales, beside zero points,
        and the grid of a group without inputs.
        """
        packed, origin = self.packed, self._origin
        if not origin.lossless:
            raise RequestError("float32 scales beside zero points, and groups without inputs, are kept rounded only")
        q, scale, zero = unpack(packed), packed.scale().to(origin.dtype), packed.zero()
        if packed.permutation is None and origin.parts is None:
            return QuantizedWeight(q, scale, zero, self.bits)
        group_of = torch.arange(self.in_features, device=q.device) // self.group_size
        if packed.permutation is not None:
            place = torch.argsort(packed.permutation)
            q, group_of = q[:, place], group_of[place]
        if origin.parts is not None:
            parts = torch.tensor(origin.parts, device=q.device)
            first = parts.cumsum(0) - parts
            scale, zero = scale[:, first], zero[:, first]
            group_of = torch.arange(len(parts), device=q.device).repeat_interleave(parts)[group_of]
        return QuantizedWeight(q, scale, zero, self.bits, group_of.to(torch.int32))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The dense weight, for checks and for export."""
        return dequantize(self.packed, dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        weight = self.packed
        bias = None if self.bias is None else self.bias.to(x.dtype)
        few = x.device.type == "cpu" and x.numel() <= _INT4_TOKENS * self.in_features and cpu_int4.supports(weight)
        if few and not (x.requires_grad and torch.is_grad_enabled()):  # torch's operator has no gradient
            if self._int4 is None:  # made at the first decode: evaluation never needs it
                self._int4 = cpu_int4.prepare(weight)
            return cpu_int4.matmul(reference.permuted(x, weight), self._int4, bias)
        if self.counters.device != x.device:  # left behind where buffers were moved one by one
            self.counters = new_counters(x.device)
        return packed_linear(x, weight, bias, self.counters)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.group_size}"
