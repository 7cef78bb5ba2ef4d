"""Merges linears that read the same input: a token then takes four matmuls per block instead of seven."""

from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.block_structure import SIBLINGS
from llmq.models.experts import Expert
from llmq.runtime.packed_experts import takes
from llmq.runtime.packed_linear import PackedLinear


def merge_linears(model: nn.Module) -> int:
    """Merge siblings (q, k, v; gate, up) that are packed in the same way, and return how many sets were merged.

    The model still calls `q_proj`, `k_proj`, ... one by one. The first call computes the rows of all.
    """
    merged = 0
    for parent in list(model.modules()):
        if isinstance(parent, Expert) and takes(next(parent.buffers(), torch.empty(0))):
            continue  # all experts of a block run together there
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
        setattr(parent, name, MergedSibling(owner, i))
    return True


class MergedLinear(nn.Module):
    """Several linears over one input, computed together and handed out one by one."""

    def __init__(self, whole: PackedLinear, sizes: list[int]) -> None:
        super().__init__()
        self.whole, self.sizes = whole, sizes
        self._held: tuple[Tensor | None, list[Tensor | None]] = None, []

    def output(self, x: Tensor, i: int) -> Tensor:
        """Return output i for x. The first call for an x computes all outputs; the last one frees them."""
        held, outputs = self._held  # read as a pair: another thread may be running the same layer
        if held is not x or outputs[i] is None:
            outputs: list[Tensor | None] = list(self.whole(x).split(self.sizes, dim=-1))
            self._held = x, outputs
        y, outputs[i] = outputs[i], None
        assert y is not None
        if all(output is None for output in outputs):
            self._held = None, []
        return y


class MergedSibling(nn.Module):
    """Takes the place of one of the merged linears."""

    def __init__(self, owner: MergedLinear, index: int) -> None:
        super().__init__()
        # Only the first one registers the weights, so that moving and counting see them once.
        self.owner = owner if index == 0 else None
        self._shared, self.index = [owner], index
        self.in_features, self.out_features = owner.whole.in_features, owner.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self._shared[0].output(x, self.index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight [out, in] of this linear."""
        owner = self._shared[0]
        return owner.whole.dequantize(dtype).split(owner.sizes)[self.index]
