"""What every rounding algorithm is asked and what it answers. Layers with the same input are one stacked problem."""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from llmq.calibration.input_statistics import InputStatistics
from llmq.core import grid
from llmq.core.settings import Grid

# Rows whose products with H are held at once.
_ROWS = 1024
# Weights rounded at once: at 4 MB what is made of them stays in the cache. All 22016 x 4096 weights of a layer take
# 0.2 s, 0.6 s when rounded as one (one core, 32 MB of cache, 2026-11-25). A GPU takes more, for fewer launches.
_WEIGHTS = {"cpu": 2**20, "cuda": 2**25}
# Products give a row the same bits whatever is beside it, and however many threads there are, in multiples of so many
# rows (cholesky.py). Those of linears that can be packed are multiples of 32.
ROW_MULTIPLE = 16


@dataclass
class Problem:
    """Choose codes for W so that the outputs X Wᵀ change least: minimise tr(ΔW H ΔWᵀ)."""

    W: Float[Tensor, "out in"]
    """Weights of a group's linears, stacked along the outputs: float32, or as stored where there are no statistics."""
    statistics: InputStatistics | None
    """None for methods that look at the weights only."""
    grid: Grid
    """Bits, symmetry and a positive group size that divides the inputs."""
    scale_dtype: torch.dtype
    """Storage dtype of the scales."""
    clippable: Bool[Tensor, "out"]
    """Rows that a clip search may clip (queries and keys are better left alone)."""

    def rows(self, start: int, stop: int) -> Problem:
        """The same for some of the rows, as views: rows do not interact, and H is that of all.

        Solved apart, in multiples of ROW_MULTIPLE, rows get the very codes they get together.
        """
        stats = self.statistics
        if stats is not None:
            target_moment, target_moment_val = (
                None if each is None else each[start:stop] for each in (stats.target_moment, stats.target_moment_val)
            )
            stats = replace(stats, target_moment=target_moment, target_moment_val=target_moment_val)
        return replace(self, W=self.W[start:stop], statistics=stats, clippable=self.clippable[start:stop])

    def grid_of(
        self, W: Float[Tensor, "*groups size"], shrink: Tensor | float = 1.0
    ) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
        """Scale and zero that span each group of weights; see grid.choose_scale_zero."""
        return grid.choose_scale_zero(W, self.grid.bits, self.grid.symmetric, self.scale_dtype, shrink)

    def searched_grid(
        self, W: Float[Tensor, "out *groups size"], importance: Float[Tensor, "*groups size"] | None
    ) -> tuple[Float[Tensor, "out *groups"], UInt8[Tensor, "out *groups"]]:
        """Scale and zero of each group of weights as the grid's `search` asks for them.

        Args:
            importance: what an error in each column costs; None where nothing is known of the inputs.
        """
        scale = torch.empty(W.shape[:-1], dtype=self.scale_dtype, device=W.device)
        zero = torch.empty(W.shape[:-1], dtype=torch.uint8, device=W.device)
        for rows in strips(W):
            # Contiguous: sums over columns that are not depend on how many rows there are.
            scale[rows], zero[rows] = self._searched(computable(W[rows]).contiguous(), importance)
        return scale, zero

    def _searched(self, W: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
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

    def rows(self, start: int, stop: int) -> Solution:
        """That of some of the rows, as views."""
        return replace(self, q=self.q[start:stop], scale=self.scale[start:stop], zero=self.zero[start:stop])

    def to(self, device: torch.device) -> Solution:
        """The same on another device."""
        return replace(self, q=self.q.to(device), scale=self.scale.to(device), zero=self.zero.to(device))

    def dequantize(self, group_size: int) -> Float[Tensor, "out in"]:
        codes = grid.group_view(self.q, group_size)
        W = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in strips(codes):
            scale, zero = self.scale[rows][..., None], self.zero[rows][..., None]
            W[rows] = grid.dequantize(codes[rows], scale, zero, torch.float32)
        return W.flatten(-2)


def joined(solutions: list[Solution]) -> Solution:
    """The solution of a problem from those of its rows, in their order."""
    q, scale, zero = (torch.cat([getattr(each, part) for each in solutions]) for part in ("q", "scale", "zero"))
    return replace(solutions[0], q=q, scale=scale, zero=zero)


def strips(W: Tensor) -> list[slice]:
    """Rows of W to be looked at together, each strip about as many weights as suit the device."""
    size = max(1, _WEIGHTS.get(W.device.type, _WEIGHTS["cpu"]) // max(1, W[:1].numel()))
    return [slice(start, start + size) for start in range(0, len(W), size)]


def computable(W: Tensor) -> Tensor:
    """W in float32 if it is stored in fewer bits."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def spread(rows: int) -> slice:
    """Some 256 of so many rows, evenly spread: what suits them suits all."""
    step = max(1, rows // 256)
    count = len(range(0, rows, step))
    return slice(0, max(count % ROW_MULTIPLE, count // ROW_MULTIPLE * ROW_MULTIPLE) * step, step)


def round_to_nearest(problem: Problem, shrink: Float[Tensor, "out groups"] | None = None) -> Solution:
    """Every weight to the nearest point of its own group's grid. `shrink` narrows the grids."""
    W = problem.groups()
    return rounded(problem, lambda rows: problem.grid_of(computable(W[rows]), 1.0 if shrink is None else shrink[rows]))


def rounded(problem: Problem, grid_of: Callable[[slice], tuple[Tensor, Tensor]]) -> Solution:
    """Every weight to the nearest point of its group's grid, of which `grid_of` tells scale and zero for some rows."""
    W = problem.groups()
    q = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scale = torch.empty(W.shape[:-1], dtype=problem.scale_dtype, device=W.device)
    zero = torch.empty(W.shape[:-1], dtype=torch.uint8, device=W.device)
    for rows in strips(W):
        scale[rows], zero[rows] = grid_of(rows)
        q[rows] = grid.quantize(computable(W[rows]), scale[rows][..., None], zero[rows][..., None], problem.grid.bits)
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
    A.diagonal().add_(damping * mean(H.diagonal()))
    return A


def mean(terms: Float[Tensor, "n"]) -> float:
    """In the same bits whatever the number of threads, which otherwise share out the sum of many terms."""
    return sum(float(part.sum(dtype=torch.float64)) for part in terms.split(_ROWS)) / len(terms)


def lost_energy(problem: Problem, solution: Solution, H: Tensor | None) -> float:
    """tr(ΔW H ΔWᵀ). H None means the identity."""
    size, rows = problem.grid.group_size, range(0, len(problem.W), _ROWS)
    parts = ((problem.W[at : at + _ROWS], solution.rows(at, at + _ROWS)) for at in rows)
    return sum((energy(W - part.dequantize(size), H) for W, part in parts), 0.0)


def energy(W: Tensor, H: Tensor | None) -> float:
    """tr(W H Wᵀ): mean squared output of a layer with these weights. H None means the identity."""
    return sum(inner(w, w if H is None else w @ H) for w in map(computable, W.split(_ROWS)))


def inner(A: Float[Tensor, "rows in"], B: Float[Tensor, "rows in"]) -> float:
    """⟨A, B⟩, row by row: torch shares out a sum to one number by the number of threads, with other bits."""
    return sum((float((A[rows] * B[rows]).sum(-1, dtype=torch.float64).sum()) for rows in strips(A)), 0.0)
