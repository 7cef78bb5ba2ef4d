"""The question to every rounding algorithm, Problem, and its answer, Solution. Linears with one input are stacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from llmq.algorithms.stable_sums import computable, mean, strips
from llmq.calibration.input_statistics import InputStatistics
from llmq.core import affine_grid, grid
from llmq.core.settings import Grid

# In multiples of this many rows, a matrix product gives each row the same bits for any other rows beside it and any
# number of threads (cholesky.py). A group with other numbers of rows gets rows of zeros (run/layer_problem.py).
ROW_MULTIPLE = 16


@dataclass
class Problem:
    """The task to choose codes for W so that the outputs X Wᵀ change least: minimise tr(ΔW H ΔWᵀ)."""

    W: Float[Tensor, "out in"]
    """Weights of a group's linears, stacked along the outputs: float32, or in their stored dtype without statistics."""
    statistics: InputStatistics | None  # None for methods that use the weights only
    grid: Grid  # bits, symmetry and a positive group size that divides the inputs
    scale_dtype: torch.dtype  # storage dtype of the scales
    clippable: Bool[Tensor, "out"]
    """True for rows that a clip search may clip. Queries and keys are better not clipped."""

    def rows(self, start: int, stop: int) -> Problem:
        """Return the problem of some rows, as views. Rows do not interact, so H is the same for all.

        Rows solved apart in multiples of ROW_MULTIPLE get the same codes as rows solved together.
        """
        stats = self.statistics
        if stats is not None:
            both = (stats.target_moment, stats.target_moment_val)
            moment, moment_val = (None if moment is None else moment[start:stop] for moment in both)
            stats = replace(stats, target_moment=moment, target_moment_val=moment_val)
        return replace(self, W=self.W[start:stop], statistics=stats, clippable=self.clippable[start:stop])

    def grid_of(
        self, W: Float[Tensor, "*groups size"], shrink: Tensor | float = 1.0
    ) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"] | Float64[Tensor, "*groups"]]:
        """Return the scale and zero that span each group of weights; see choose_scale_zero of both grids."""
        if self.grid.real_zeros:
            return affine_grid.choose_scale_zero(W, self.grid.bits, self.scale_dtype, shrink)
        return grid.choose_scale_zero(W, self.grid.bits, self.grid.symmetric, self.scale_dtype, shrink)

    def searched_grid(
        self, W: Float[Tensor, "out *groups size"], importance: Float[Tensor, "*groups size"] | None
    ) -> tuple[Float[Tensor, "out *groups"], UInt8[Tensor, "out *groups"] | Float64[Tensor, "out *groups"]]:
        """Return the scale and zero of each group of weights, found by the grid's `search`.

        `importance`: the cost of an error in each column; None if there are no statistics of the inputs.
        """
        scale = torch.empty(W.shape[:-1], dtype=self.scale_dtype, device=W.device)
        zero = torch.empty(W.shape[:-1], dtype=self.zero_dtype, device=W.device)
        for rows in strips(W):
            # If the rows were not contiguous, sums over columns would depend on the number of rows.
            scale[rows], zero[rows] = self._searched(computable(W[rows]).contiguous(), importance)
        return scale, zero

    def _searched(self, W: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the scale and zero of each group of some rows."""
        search = self.grid.search
        if search == "auto":
            search = "minmax" if importance is None else "hessian"
        if search == "common" and self.grid.symmetric:
            return grid.common_scale_zero(W, self.grid.bits, self.scale_dtype)
        if search in ("minmax", "common"):
            return self.grid_of(W)
        power = 2.4 if search == "mse" else 2.0
        if search == "mse":
            importance = torch.ones_like(W[..., :1]).expand_as(W)
        assert importance is not None, "a grid weighted by the Hessian needs input statistics"
        if self.grid.real_zeros:
            return affine_grid.search_scale_zero(W, importance, self.grid.bits, self.scale_dtype, power)
        return grid.search_scale_zero(W, importance, self.grid.bits, self.grid.symmetric, self.scale_dtype, power)

    @property
    def zero_dtype(self) -> torch.dtype:
        """Return the dtype of zero points."""
        return torch.float64 if self.grid.real_zeros else torch.uint8

    def groups(self) -> Float[Tensor, "out groups size"]:
        """Return W cut into groups, as a view."""
        return grid.group_view(self.W, self.grid.group_size)


@dataclass(frozen=True)
class Solution:
    """Codes and grids for a Problem, and a record of how they were found."""

    q: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"] | Float64[Tensor, "out groups"]
    damping: float | None = None  # fraction of mean(diag H) that was added to the diagonal of H
    fallbacks: list[str] = field(default_factory=list)
    matched: float | None = None
    """α of output_matching.Match, 0 to 1: how far the weights were moved before they were rounded."""
    kept: list[str] = field(default_factory=list)  # names of the trials of best_of.py that lowered the held-out loss

    def rows(self, start: int, stop: int) -> Solution:
        """Return the solution of some rows, as views."""
        return replace(self, q=self.q[start:stop], scale=self.scale[start:stop], zero=self.zero[start:stop])

    def to(self, device: torch.device) -> Solution:
        """Return the solution on another device."""
        return replace(self, q=self.q.to(device), scale=self.scale.to(device), zero=self.zero.to(device))

    def dequantize(self, group_size: int) -> Float[Tensor, "out in"]:
        """Return the quantized weights Ŵ in float32."""
        codes = grid.group_view(self.q, group_size)
        W = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in strips(codes):
            scale, zero = self.scale[rows][..., None], self.zero[rows][..., None]
            W[rows] = grid.dequantize(codes[rows], scale, zero, torch.float32)
        return W.flatten(-2)


def joined(solutions: list[Solution]) -> Solution:
    """Return the solution of a whole problem from the solutions of its rows, given in order."""
    q, scale, zero = (torch.cat([getattr(piece, name) for piece in solutions]) for name in ("q", "scale", "zero"))
    return replace(solutions[0], q=q, scale=scale, zero=zero)


def spread(rows: int) -> slice:
    """Return a slice that picks about 256 of the rows, evenly spread. A setting that suits them suits all rows."""
    stride = max(1, rows // 256)
    count = len(range(0, rows, stride))
    return slice(0, max(count % ROW_MULTIPLE, count // ROW_MULTIPLE * ROW_MULTIPLE) * stride, stride)


def round_to_nearest(problem: Problem, shrink: Float[Tensor, "out groups"] | None = None) -> Solution:
    """Round every weight to the nearest point of its group's grid. `shrink` narrows the grids."""
    W = problem.groups()
    return rounded(problem, lambda rows: problem.grid_of(computable(W[rows]), 1.0 if shrink is None else shrink[rows]))


def rounded(problem: Problem, grid_of: Callable[[slice], tuple[Tensor, Tensor]]) -> Solution:
    """Round every weight to the nearest point of its group's grid. `grid_of` returns scale and zero of some rows."""
    W = problem.groups()
    q = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scale = torch.empty(W.shape[:-1], dtype=problem.scale_dtype, device=W.device)
    zero = torch.empty(W.shape[:-1], dtype=problem.zero_dtype, device=W.device)
    for rows in strips(W):
        scale[rows], zero[rows] = grid_of(rows)
        q[rows] = grid.quantize(computable(W[rows]), scale[rows][..., None], zero[rows][..., None], problem.grid.bits)
    return Solution(q.flatten(-2), scale, zero)


def nearest_points(
    problem: Problem, W: Float[Tensor, "out groups size"], shrink: Tensor | float = 1.0
) -> Float[Tensor, "out groups size"]:
    """Return Ŵ for weights that are already cut into groups."""
    scale, zero = (tensor[..., None] for tensor in problem.grid_of(W, shrink))
    return grid.dequantize(grid.quantize(W, scale, zero, problem.grid.bits), scale, zero, W.dtype)


def damped(H: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return a copy of H with `damping` times its mean diagonal added to the diagonal. H itself is shared: keep it."""
    A = H.clone()
    A.diagonal().add_(damping * mean(H.diagonal()))
    return A
