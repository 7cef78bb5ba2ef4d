"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., arXiv 2210.17323).

Objective, per row w of W, over codes on the grid:    (w - ŵ) H (w - ŵ)ᵀ,    H = XᵀX / tokens

Round one column after the other; after column i, move its rounding error onto the columns not rounded yet:

    Err_i = (w_i - ŵ_i) / U_ii        W[:, i+1:] -= Err_i · U[i, i+1:]        H⁻¹ = Uᵀ U

Columns wait for the updates of earlier blocks until their own block begins (the paper's lazy batch):

    columns       |------- block B1 -------|------- block B2 -------|  ...
    groups        |---- G1 ---|---- G2 ----|---- G3 ---|---- G4 ----|  ...
    in block B1     rank-1 updates inside the block only, on a copy that later groups of the block see
    after block B1  one matmul carries all of its errors to every column on the right

What deviates from the paper, and why:
  * H is shared by all linears with the same input and their rows are stacked, so there is one factorisation and one
    column loop per input. Rows do not interact: the result is that of separate runs.
  * U comes from one Cholesky factorisation: with the reversal P, U = P · chol(P H P)⁻¹ · P. The paper's chol(inv(H))
    costs twice as much and has a second place to fail.
  * Group-aware order (arXiv 2505.14638): whole groups, and columns within a group, are visited by falling diag(H).
    Groups stay whole, so nothing about the order has to be stored.
  * A group's grid is fitted when the loop reaches it, to the weights as updated so far, in-block updates included. Of
    several widths it takes the one with the least rounding error, each column weighted by D_k = 1 / U_kk²: what an
    error there still costs after all later columns have compensated for it (arXiv 2602.02126 weights by H itself).
  * Columns that never saw an activation keep their weight and are rounded to nearest (the paper sets them to 0): a
    calibration text that misses a channel is no proof that others will.
  * Damping 0.05 instead of 0.01: worse on the calibration tokens, better on held-out ones.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmq import grid
from llmq.algorithms.problem import Problem, Solution
from llmq.config import Gptq
from llmq.errors import WorkError

# Multiples of the requested damping, tried in order when H is not numerically positive definite.
_DAMPING_LADDER = (1, 2, 5, 10, 100)
# 2-bit grids are best far inside the range of the weights; wider ones stop near 0.8.
_NARROWEST = 0.4


def solve(problem: Problem, settings: Gptq) -> Solution:
    """Codes for the stacked rows of one group of linears.

    Raises WorkError if H cannot be factorised even with a hundred times the damping.
    """
    assert problem.statistics is not None, "gptq needs input statistics"
    H, dead = _without_dead_columns(problem.statistics.H)
    group_size = problem.grid.group_size
    order = group_aware_order(H.diagonal(), group_size)
    U, damping, fallbacks = factorise(H[order][:, order], settings.damping)
    if dead:
        fallbacks.append(f"{dead} input channels never active: rounded to nearest")
    block_size = _aligned_block_size(settings.block_size, group_size, len(H))
    q, scale, zero = _round_columns(problem, order, U, replace(settings, block_size=block_size))
    inverse = torch.argsort(order)
    group_inverse = inverse[::group_size] // group_size
    return Solution(q[:, inverse], scale[:, group_inverse], zero[:, group_inverse], damping, fallbacks)


def _without_dead_columns(H: Tensor) -> tuple[Tensor, int]:
    """A channel with H_ii = 0 gets an average H_ii, which makes it independent of the others. H itself is shared."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if not count:
        return H, 0
    average = float(diagonal.sum()) / max(1, len(diagonal) - count)
    return H + torch.diag(dead.to(H.dtype) * (average or 1.0)), count


def group_aware_order(diagonal: Float[Tensor, "columns"], group_size: int) -> Int64[Tensor, "columns"]:
    """Groups by falling largest diag(H), columns within each group likewise; groups stay contiguous."""
    groups = diagonal.view(-1, group_size)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    between = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (within + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size)[between].flatten()


def factorise(H: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], float, list[str]]:
    """Upper triangular U with (H + damping·mean(diag H)·I)⁻¹ = Uᵀ U, the damping used, and what had to be tried.

    The ladder: float32, then float64 at the same damping, then float64 with more damping. H is not modified.
    """
    fallbacks: list[str] = []
    for factor in _DAMPING_LADDER:
        for dtype in (torch.float32, torch.float64):
            if factor > 1 and dtype == torch.float32:
                continue
            U = _upper_factor_of_inverse(H, damping * factor, dtype)
            if U is not None:
                return U.to(H.dtype), damping * factor, fallbacks
            fallbacks.append(f"Cholesky failed in {str(dtype).removeprefix('torch.')} at damping {damping * factor:g}")
    raise WorkError("; ".join(fallbacks) + ": the input statistics are not finite or not positive")


def _upper_factor_of_inverse(H: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    damped = H.to(torch.promote_types(dtype, H.dtype))
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(H), dtype=damped.dtype, device=H.device)
    L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if bool(failed):
        return None
    identity = torch.eye(len(H), dtype=L.dtype, device=L.device)
    U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
    return U if bool(torch.isfinite(U).all()) else None


def _round_columns(
    problem: Problem, order: Int64[Tensor, "in"], U: Float[Tensor, "in in"], settings: Gptq
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop over W, columns in visiting order: codes [out, in], scale and zero [out, groups]."""
    group_size, block_size, columns = problem.grid.group_size, settings.block_size, len(order)
    D = U.diagonal() ** -2
    # Transposed, a column of W is a contiguous row: the loop below touches nothing else.
    Wt = problem.W.T[order]
    Q = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    scale = zero = torch.empty(0)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        Wb = Wt[start:stop].clone()
        Err = torch.empty_like(Wb)
        for i in range(stop - start):
            column = start + i
            if column % group_size == 0:
                fresh = (Wb[i : i + group_size] if i + group_size <= len(Wb) else Wt[column : column + group_size]).T
                scale, zero = _best_grid(problem, fresh, D[column : column + group_size], settings.grid_steps)
                scales.append(scale)
                zeros.append(zero)
            q = grid.quantize(Wb[i], scale, zero, problem.grid.bits)
            Q[column] = q
            Err[i] = (Wb[i] - grid.dequantize(q, scale, zero, Wt.dtype)) / U[column, column]
            Wb[i + 1 :].addr_(U[column, column + 1 : stop], Err[i], alpha=-1)
        Wt[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
    return Q.T.contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1)


def _best_grid(
    problem: Problem, W: Float[Tensor, "out size"], D: Float[Tensor, "size"], steps: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row's group, the width chosen among `steps` to minimise Σ_k D_k (w_k - ŵ_k)²."""
    grids = [problem.grid_of(W, shrink) for shrink in torch.linspace(1, _NARROWEST, steps).tolist()]
    errors = []
    for scale, zero in grids:
        q = grid.quantize(W, scale[:, None], zero[:, None], problem.grid.bits)
        errors.append((W - grid.dequantize(q, scale[:, None], zero[:, None], W.dtype)).square() @ D)
    best = torch.stack(errors).argmin(0, keepdim=True)
    scales, zeros = (torch.stack(parts).gather(0, best)[0] for parts in zip(*grids, strict=True))
    return scales, zeros


def _aligned_block_size(requested: int, group_size: int, columns: int) -> int:
    """Near the request, a multiple or divisor of the group size: a group is up to date when its first column is."""
    if requested >= group_size:
        return requested // group_size * group_size
    return next(size for size in range(min(requested, columns), 0, -1) if group_size % size == 0)
