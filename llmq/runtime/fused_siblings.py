"""Linears that read the same input run as one: a decode step then launches four matmuls per block instead of seven."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.block_structure import SIBLINGS
from llmq.runtime.packed_linear import PackedLinear


def merge_linears(model: nn.Module) -> int:
    """Merge siblings wherever a model has them packed alike; returns how many sets were merged.

    The model's own code goes on calling `q_proj`, `k_proj`, ...: the first one called computes the rows of all.
    """
    merged = 0
    for parent in list(model.modules()):
        for names in SIBLINGS:
            linears = [getattr(parent, name, None) for name in names]
            if all(isinstance(linear, PackedLinear) for linear in linears):
                merged += _merge(parent, names, linears)
    return merged


def _merge(parent: nn.Module, names: tuple[str, ...], linears: list[Any]) -> bool:
    whole = PackedLinear.stack(linears)
    if whole is None:
        return False
    owner = MergedLinear(whole, [linear.out_features for linear in linears])
    for i, name in enumerate(names):
        setattr(parent, name, MergedPart(owner, i))
    return True


class MergedLinear(nn.Module):
    """Several linears over one input; hands out the outputs one by one."""

    def __init__(self, whole: PackedLinear, sizes: list[int]) -> None:
        super().__init__()
        self.whole, self.sizes = whole, sizes
        self._held: tuple[Tensor | None, list[Tensor | None]] = None, []

    def part(self, x: Tensor, i: int) -> Tensor:
        """Output i for x: computed at the first request for x, let go of at the last."""
        held, outputs = self._held  # together: another thread may be running the same layer
        if held is not x or outputs[i] is None:
            outputs: list[Tensor | None] = list(self.whole(x).split(self.sizes, dim=-1))
            self._held = x, outputs
        y, outputs[i] = outputs[i], None
        assert y is not None
        if all(output is None for output in outputs):
            self._held = None, []
        return y


class MergedPart(nn.Module):
    """Stands where one of the merged linears stood."""

    def __init__(self, owner: MergedLinear, index: int) -> None:
        super().__init__()
        # One of the parts registers the weights, so that moves and counts see them once.
        self.owner = owner if index == 0 else None
        self._shared, self.index = [owner], index
        self.in_features, self.out_features = owner.whole.in_features, owner.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self._shared[0].part(x, self.index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight of this part, [out, in]."""
        owner = self._shared[0]
        return owner.whole.dequantize(dtype).split(owner.sizes)[self.index]
