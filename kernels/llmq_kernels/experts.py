"""The packed weights of a layer's experts, stacked: one tensor for all, of which each expert's weight is a view.

>>> from llmq_kernels.layout import pack
>>> codes = torch.full((6, 64), 8, dtype=torch.uint8)                                # [out, in]
>>> scale, zero = torch.ones(6, 1), torch.full((6, 1), 8, dtype=torch.uint8)
>>> experts = stack_experts([pack(codes, scale, zero, bits=4), pack(codes, -scale, zero, bits=4)])
>>> experts.words[0].shape, experts.grid.shape                                       # [E, out, _], [E, groups, out]
(torch.Size([2, 6, 64]), torch.Size([2, 1, 6]))
>>> experts.expert(1).words[0].data_ptr() == experts.words[0][1].data_ptr()
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int16, Int32, Int64
from torch import Tensor

from llmq_kernels.layout import PackedWeight, plane_of


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of E experts, all of one kind. Each is laid out as `PackedWeight` tells."""

    words: tuple[Int16[Tensor, "experts out _"], ...]
    grid: Int32[Tensor, "experts groups out"]
    bits: int
    group_size: int
    in_features: int
    symmetric: bool
    permutation: Int64[Tensor, "experts in"] | None = None

    def __len__(self) -> int:
        return self.grid.shape[0]

    @property
    def out_features(self) -> int:
        return self.grid.shape[2]

    @property
    def plane(self) -> int:
        return plane_of(self.group_size, self.in_features)

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def expert(self, e: int, start: int = 0, stop: int | None = None) -> PackedWeight:
        """Return rows start to stop of expert e: views, but for the grid of a part of the rows, which is a copy."""
        words = tuple(array[e, start:stop] for array in self.words)
        grid = self.grid[e, :, start:stop].contiguous()  # what multiplies reads a grid without gaps
        permutation = None if self.permutation is None else self.permutation[e]
        return PackedWeight(words, grid, self.bits, self.group_size, self.in_features, self.symmetric, permutation)


def stack_experts(weights: Sequence[PackedWeight]) -> ExpertWeights | None:
    """Stack the weights of experts, copying them. Return None unless shapes, bits, groups and symmetry agree.

    Where some experts are permuted, the others get the permutation that changes nothing.
    """
    first = weights[0]
    kinds = {(w.bits, w.group_size, w.in_features, w.out_features, w.symmetric, w.device) for w in weights}
    if len(kinds) > 1:
        return None
    permutation = None
    if any(w.permutation is not None for w in weights):
        unchanged = torch.arange(first.in_features, device=first.device)
        permutation = torch.stack([unchanged if w.permutation is None else w.permutation for w in weights])
    words = tuple(torch.stack(arrays) for arrays in zip(*(w.words for w in weights), strict=True))
    grid = torch.stack([w.grid for w in weights])
    return ExpertWeights(words, grid, first.bits, first.group_size, first.in_features, first.symmetric, permutation)


def tiles_for(pairs: int, experts: int, BM: int) -> int:
    """Return the most tiles of BM pairs of (token, expert) that there can be, however the tokens are routed.

    Each expert that has pairs may have a last tile with one of them; all other pairs fill tiles.
    """
    hit = min(pairs, experts)
    return hit + (pairs - hit) // BM
