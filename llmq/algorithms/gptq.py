"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., arXiv 2210.17323).

Objective, per row w of W, over codes on the grid:    (w - ŵ) H (w - ŵ)ᵀ,    H = XᵀX / tokens

Round one column after the other; after column i, move its rounding error onto the columns not rounded yet:

    Err_i = (w_i - ŵ_i) / U_ii        W[:, i+1:] -= Err_i · U[i, i+1:]        H⁻¹ = Uᵀ U

Columns wait for the updates of earlier blocks until their own block begins (the paper's lazy batch), here in two steps:

    columns         |------- block B1 -------|------- block B2 -------|  ...
    groups          |---- G1 ---|---- G2 ----|---- G3 ---|---- G4 ----|  ...
    in group G1       rank-1 updates inside the group only (columns.py)
    after group G1                a matmul carries its errors to the rest of its block
    after block B1                           a matmul carries all of its errors to every column on the right

What deviates from the paper, and why:
  * H is shared by all linears with the same input and their rows are stacked, so there is one factorisation and one
    column loop per input. Rows do not interact: the result is that of separate runs.
  * U comes from one Cholesky factorisation: with the reversal P, U = P · chol(P H P)⁻¹ · P. The paper's chol(inv(H))
    costs twice as much and has a second place to fail. All of it happens in one copy of H (cholesky.py).
  * Order: `group` (arXiv 2505.14638) visits whole groups, and the columns within a group, by falling diag(H); `static`
    visits all columns by falling diag(H), on grids fixed beforehand; `natural` goes from left to right. Groups of the
    checkpoint stay what they are, so nothing about the order has to be stored.
  * A group's grid is fitted when the loop reaches it, to the weights as updated so far, in-block updates included: the
    one with the least rounding error, each column weighted by D_k = 1 / U_kk², which is what an error there still costs
    after all later columns have compensated for it (arXiv 2602.02126 weights by H itself).
  * Afterwards every column is looked at again a few times (descent.py).
  * Columns that never saw an activation keep their weight and are rounded to nearest (the paper sets them to 0): a
    calibration text that misses a channel is no proof that others will.
  * Damping 0.05 instead of 0.01: worse on the calibration tokens, better on held-out ones.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmq.algorithms.cholesky import cholesky_
from llmq.algorithms.coordinate_descent import descend
from llmq.algorithms.gptq_columns import round_columns
from llmq.algorithms.problem import Problem, Solution, joined
from llmq.algorithms.stable_sums import mean
from llmq.core.errors import WorkError
from llmq.core.settings import Gptq

# Multiples of the requested damping, tried in order when H is not numerically positive definite.
_DAMPING_LADDER = (1, 2, 5, 10, 100)
_AT_ONCE = 128  # columns between which rank-1 updates go back and forth; more are left to matmuls
_ROWS = 1024  # of H copied at once
_ROWS_PER_SOLVE = 4096  # rows


def solve(problem: Problem, settings: Gptq) -> Solution:
    """Codes for the stacked rows of one group of linears.

    Raises WorkError if H cannot be factorised even with a hundred times the damping.
    """
    assert problem.statistics is not None, "gptq needs input statistics"
    H = problem.statistics.H
    diagonal, dead = _without_dead_columns(H.diagonal())
    order = visiting_order(settings.order, diagonal, problem.grid.group_size)
    U, damping, fallbacks = factorise(H, diagonal, order, settings.damping)
    if dead:
        fallbacks.append(f"{dead} input channels never active: rounded to nearest")
    together = rows_per_solve(H.device)
    parts = [problem.rows(start, start + together) for start in range(0, max(1, len(problem.W)), together)]
    solutions = [Solution(*_round_columns(part, order, U, settings), damping, fallbacks) for part in parts]
    del U  # makes room for another matrix of H's size
    if settings.passes:
        A = H.clone()
        A.diagonal().copy_(diagonal + damping * mean(diagonal))
        solutions = [descend(*each, A, settings.passes) for each in zip(parts, solutions, strict=True)]
    return joined(solutions)


def rows_per_solve(device: torch.device) -> int:
    """Rows of W solved at once.

    On a CPU more are no faster (8192 of 2048 columns: 2.2 s, 2.5 s as one; 2026-11-25) and take memory. On a GPU, whose
    time goes into launches, all of them.
    """
    return _ROWS_PER_SOLVE if device.type == "cpu" else sys.maxsize


def _without_dead_columns(diagonal: Float[Tensor, "columns"]) -> tuple[Float[Tensor, "columns"], int]:
    """A channel with H_ii = 0 gets an average H_ii, which makes it independent of the others. Also how many did."""
    dead = diagonal == 0
    count = int(dead.sum())
    average = mean(diagonal) * len(diagonal) / max(1, len(diagonal) - count)
    return diagonal.where(~dead, average or 1.0), count


def visiting_order(kind: str, diagonal: Float[Tensor, "columns"], group_size: int) -> Int64[Tensor, "columns"]:
    """The columns in the order they are rounded: `group`, `static` or `natural`."""
    if kind == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if kind == "static":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group_size)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    between = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (within + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size)[between].flatten()


def factorise(
    H: Float[Tensor, "n n"], diagonal: Float[Tensor, "n"], order: Int64[Tensor, "n"], damping: float
) -> tuple[Float[Tensor, "n n"], float, list[str]]:
    """Upper triangular U with (H + damping·mean(diag H)·I)⁻¹ = Uᵀ U, the damping used, and what had to be tried.

    The ladder: float32, then float64 at the same damping, then float64 with more damping. H is not modified.

    Args:
        diagonal: of H, but for the columns that are to be independent of the others.
        order: that of U's columns.
    """
    fallbacks: list[str] = []
    for factor in _DAMPING_LADDER:
        raised = diagonal.double() + damping * factor * mean(diagonal)
        for dtype in (torch.float32, torch.float64):
            if factor > 1 and dtype == torch.float32:
                continue
            U = _upper_factor_of_inverse(H, raised, order, torch.promote_types(dtype, H.dtype))
            if U is not None:
                return U.to(H.dtype), damping * factor, fallbacks
            fallbacks.append(f"Cholesky failed in {str(dtype).removeprefix('torch.')} at damping {damping * factor:g}")
    raise WorkError("; ".join(fallbacks) + ": the input statistics are not finite or not positive")


def _upper_factor_of_inverse(H: Tensor, diagonal: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor | None:
    """U, if H with this diagonal has one: from the last column to the first, in one place from H's copy to the end."""
    A, order = torch.empty(H.shape, dtype=dtype, device=H.device), order.flip(0)
    for rows in (slice(start, start + _ROWS) for start in range(0, len(H), _ROWS)):
        A[rows] = H.index_select(0, order[rows]).index_select(1, order)
    A.diagonal().copy_(diagonal[order])
    factor = cholesky_(A)
    if factor is None:
        return None
    U = _turn_(factor.invert_())
    # A sum is finite only if every term is.
    return U if bool(torch.isfinite(U.sum(1)).all()) else None


def _turn_(A: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A with both its rows and its columns in reverse, in A's place: all that is in it, read backwards."""
    flat = A.view(-1)
    for start in range(0, len(flat) // 2, len(A) * _ROWS):
        head = flat[start : min(start + len(A) * _ROWS, len(flat) // 2)]
        tail = flat[len(flat) - start - len(head) : len(flat) - start]
        turned = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(turned)
    return A


def _round_columns(
    problem: Problem, order: Int64[Tensor, "in"], U: Float[Tensor, "in in"], settings: Gptq
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop over W: codes [out, in]; scale and zero [out, groups]."""
    size, columns, static = problem.grid.group_size, len(order), settings.order == "static"
    D = U.diagonal() ** -2
    # Transposed, a column of W is a contiguous row.
    Wt = problem.W.index_select(1, order).T.contiguous()
    Q = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
    scale = torch.empty(columns // size, Wt.shape[1], dtype=problem.scale_dtype, device=Wt.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=Wt.device)
    group_of = order // size
    if static:
        parts = problem.searched_grid(problem.groups(), D[torch.argsort(order)].view(-1, size))
        scale, zero = (part.T.contiguous() for part in parts)
    block_size = max(1, settings.block_size // size) * size
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        Err = torch.empty_like(Wt[start:stop])
        for here in _within_groups(start, stop, size):
            if not static and here.start % size == 0:
                group = slice(here.start, here.start + size)
                scale[group_of[here.start]], zero[group_of[here.start]] = problem.searched_grid(Wt[group].T, D[group])
            groups = group_of[here] if static else group_of[here.start : here.start + 1]
            Q[here], errors = round_columns(Wt[here], U[here, here], scale[groups], zero[groups], problem.grid.bits)
            Err[here.start - start : here.stop - start] = errors
            Wt[here.stop : stop].addmm_(U[here, here.stop : stop].T, errors, alpha=-1)
        Wt[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
    return Q[torch.argsort(order)].T.contiguous(), scale.T.contiguous(), zero.T.contiguous()


def _within_groups(start: int, stop: int, size: int) -> Iterator[slice]:
    """Stretches of at most _AT_ONCE columns that do not straddle groups."""
    for first in range(start, stop, size):
        for at in range(first, first + size, _AT_ONCE):
            yield slice(at, min(at + _AT_ONCE, first + size))
