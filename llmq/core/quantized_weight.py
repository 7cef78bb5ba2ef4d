"""The value in the middle: every algorithm returns it, every format stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int32, UInt8
from torch import Tensor

from llmq.core import grid
from llmq.core.errors import CheckpointError


@dataclass(frozen=True)
class QuantizedWeight:
    """w ~= scale * (q - zero): one (scale, zero) per output row and group of consecutive inputs."""

    q: UInt8[Tensor, "out in"]  # codes in [0, 2**bits), one per byte. Formats pack them.
    scale: Float[Tensor, "out groups"]  # in the file's dtype: q was rounded against this very value. May be negative.
    zero: UInt8[Tensor, "out groups"] | Float64[Tensor, "out groups"]
    """Zero points in code units: codes (symmetric = 2**(bits-1)), or real numbers, see affine_grid.py."""
    bits: int
    group_of: Int32[Tensor, "in"] | None = None  # group of each input (foreign act-order); None: contiguous groups
    input_scale: Float[Tensor, "1"] | None = None  # of inputs that are rounded to 8 bits with one scale for all tokens

    @property
    def group_size(self) -> int:
        """Return the number of inputs per group (the average if `group_of` is given)."""
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def has_real_zeros(self) -> bool:
        """Tell whether the zero points need not be codes."""
        return self.zero.is_floating_point()

    def with_codes_as_zeros(self) -> QuantizedWeight:
        """Return the same weight with uint8 zero points, if all of them are codes."""
        zero = self.zero
        if not self.has_real_zeros or not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**self.bits)).all()):
            return self
        return replace(self, zero=zero.to(torch.uint8))

    @property
    def symmetric(self) -> bool:
        """Tell whether every zero point is the middle of the codes."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return the weights that these codes stand for, computed in `dtype`."""
        if self.group_of is not None:
            group_of = self.group_of.long()
            return grid.dequantize(self.q, self.scale[:, group_of], self.zero[:, group_of], dtype)
        codes = grid.group_view(self.q, self.group_size)
        return grid.dequantize(codes, self.scale[..., None], self.zero[..., None], dtype).flatten(-2)

    def even(self) -> QuantizedWeight:
        """Return the same weights in groups of equal size, which kernels need: the largest that divides all groups."""
        if self.group_of is None:
            return self
        group_of = self.group_of.long()
        sizes = torch.bincount(group_of, minlength=self.scale.shape[1])
        size = math.gcd(*sizes.tolist())
        parts = sizes // size  # of each group
        order = torch.argsort(group_of, stable=True)
        finer = torch.empty_like(order)
        finer[order] = torch.arange(len(order), device=order.device) // size
        scale, zero = (each.repeat_interleave(parts, dim=1) for each in (self.scale, self.zero))
        contiguous = torch.equal(order, torch.arange(len(order), device=order.device))
        return QuantizedWeight(self.q, scale, zero, self.bits, None if contiguous else finer.to(torch.int32))

    def validate(self, name: str = "weight") -> None:
        """Raise CheckpointError unless the tensors fit together and decode to finite numbers."""
        (rows, columns), groups = self.q.shape, self.scale.shape[1] if self.scale.ndim == 2 else 0
        if self.scale.shape != self.zero.shape or self.scale.shape[0] != rows or groups < 1:
            shapes = f"scales {tuple(self.scale.shape)} and zeros {tuple(self.zero.shape)}"
            raise CheckpointError(f"{name}: {shapes} do not fit {rows} rows")
        if self.group_of is None and columns % groups:
            raise CheckpointError(f"{name}: {groups} groups do not divide {columns} inputs")
        if self.group_of is not None and not (
            self.group_of.shape == (columns,) and int(self.group_of.min()) >= 0 and int(self.group_of.max()) < groups
        ):
            raise CheckpointError(f"{name}: group indices must lie in [0, {groups})")
        if not bool(torch.isfinite(self.scale).all()):
            raise CheckpointError(f"{name}: a scale is not finite")
        if self.input_scale is not None and not (bool(torch.isfinite(self.input_scale)) and self.input_scale > 0):
            raise CheckpointError(f"{name}: the scale of its inputs is {float(self.input_scale)}, not above 0")
        if self.has_real_zeros and not bool(torch.isfinite(self.zero).all()):
            raise CheckpointError(f"{name}: a zero point is not finite")
        codes = (self.q,) if self.has_real_zeros else (self.q, self.zero)
        if any(int(each.max()) >= 2**self.bits for each in codes):
            raise CheckpointError(f"{name}: a code or zero point exceeds {self.bits} bits")
