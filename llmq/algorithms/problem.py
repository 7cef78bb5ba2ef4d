"""What every rounding algorithm is asked and what it answers. Layers with the same input are one stacked problem."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from llmq import grid
from llmq.settings import Grid
from llmq.statistics import InputStatistics


@dataclass
class Problem:
    """Choose codes for W so that the outputs X Wᵀ change least: minimise tr(ΔW H ΔWᵀ)."""

    W: Float[Tensor, "out in"]
    """Weights of all linears of a group, stacked along the outputs, float32."""
    statistics: InputStatistics | None
    """None for methods that look at the weights only."""
    grid: Grid
    """Bits, symmetry and a positive group size that divides the inputs."""
    scale_dtype: torch.dtype
    """Storage dtype of the scales."""
    clippable: Bool[Tensor, "out"]
    """Rows that a clip search may clip (queries and keys are better left alone)."""

    def grid_of(
        self, W: Float[Tensor, "*groups size"], shrink: Tensor | float = 1.0
    ) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
        """Scale and zero that span each group of weights; see grid.choose_scale_zero."""
        return grid.choose_scale_zero(W, self.grid.bits, self.grid.symmetric, self.scale_dtype, shrink)

    def searched_grid(
        self, W: Float[Tensor, "*groups size"], importance: Float[Tensor, "*#groups size"] | None
    ) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
        """Scale and zero of each group of weights as the grid's `search` asks for them.

        Args:
            importance: what an error in each column costs; None where nothing is known of the inputs.
        """
        search = self.grid.search
        if search == "auto":
            search = "minmax" if importance is None else "hessian"
        if search == "common" and self.grid.symmetric:
            return grid.common_scale_zero(W, self.grid.bits, self.scale_dtype)
        if search in ("minmax", "common"):
            return self.grid_of(W)
        if search == "mse":
            ones = torch.ones_like(W[..., :1]).expand_as(W)
            return grid.search_scale_zero(W, ones, self.grid.bits, self.grid.symmetric, self.scale_dtype, power=2.4)
        assert importance is not None, "a grid weighted by the Hessian needs input statistics"
        return grid.search_scale_zero(W, importance, self.grid.bits, self.grid.symmetric, self.scale_dtype)

    def groups(self) -> Float[Tensor, "out groups size"]:
        return grid.group_view(self.W, self.grid.group_size)


@dataclass(frozen=True)
class Solution:
    """Codes and grids for a Problem, and what had to be done to get them."""

    q: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    damping: float | None = None
    """Fraction of mean(diag H) that was added to the diagonal."""
    fallbacks: list[str] = field(default_factory=list)
    matched: float | None = None
    """How far the weights went towards the original model's outputs before they were rounded, 0 to 1."""
    kept: list[str] = field(default_factory=list)
    """Optional steps that helped."""

    def dequantize(self, group_size: int) -> Float[Tensor, "out in"]:
        codes = grid.group_view(self.q, group_size)
        return grid.dequantize(codes, self.scale[..., None], self.zero[..., None], torch.float32).flatten(-2)


def round_to_nearest(problem: Problem, shrink: Tensor | float = 1.0) -> Solution:
    """Every weight to the nearest point of its own group's grid. `shrink` [out, groups] narrows the grids."""
    q, scale, zero = quantize_groups(problem, problem.groups(), shrink)
    return Solution(q.flatten(-2), scale, zero)


def quantize_groups(
    problem: Problem, W: Float[Tensor, "out groups size"], shrink: Tensor | float = 1.0
) -> tuple[UInt8[Tensor, "out groups size"], Float[Tensor, "out groups"], UInt8[Tensor, "out groups"]]:
    """Codes, scales and zeros of weights already laid out in groups."""
    scale, zero = problem.grid_of(W, shrink)
    return grid.quantize(W, scale[..., None], zero[..., None], problem.grid.bits), scale, zero


def damped(H: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H with a fraction of its mean diagonal added to the diagonal; H itself is shared and stays."""
    A = H.clone()
    A.diagonal().add_(damping * H.diagonal().mean())
    return A


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor | None) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the share of the layer's output energy that is lost. H None means the identity."""
    lost, whole = energy(W - W_hat, H), energy(W, H)
    return lost / whole if whole > 0 else 0.0


def energy(W: Tensor, H: Tensor | None) -> float:
    """tr(W H Wᵀ): mean squared output of a layer with these weights. H None means the identity."""
    return float((W * (W if H is None else W @ H)).sum(dtype=torch.float64))
