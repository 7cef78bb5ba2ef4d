"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., arXiv 2210.17323).

Objective, per row w of W, over codes on the grid:    (w - ŵ) H (w - ŵ)ᵀ,    H = XᵀX / tokens

Round one column after the other; after column i, move its rounding error onto the columns not rounded yet:

    Err_i = (w_i - ŵ_i) / U_ii        W[:, i+1:] -= Err_i · U[i, i+1:]        H⁻¹ = Uᵀ U

Errors reach later blocks when a block is finished (the paper's lazy batch). Groups do the same inside a block:

    columns         |------- block B1 -------|------- block B2 -------|  ...
    groups          |---- G1 ---|---- G2 ----|---- G3 ---|---- G4 ----|  ...
    in group G1       rank-1 updates inside the group only (gptq_columns.py)
    after group G1                a matmul carries its errors to the rest of its block
    after block B1                           a matmul carries all of its errors to every column on the right

What deviates from the paper, and why:
  * Linears with the same input share H, and their rows are stacked. So there is one factorisation and one column loop
    per input. Rows do not interact: the result is the same as in separate runs.
  * U comes from one Cholesky factorisation: with the reversal P, U = P · chol(P H P)⁻¹ · P. The paper's chol(inv(H))
    costs twice as much and can fail twice. Only one copy of H is needed (cholesky.py).
  * Order: `group` (arXiv 2505.14638) visits whole groups, and the columns within a group, by falling diag(H); `static`
    visits all columns by falling diag(H), on grids fixed beforehand; `natural` goes from left to right. The groups of
    the checkpoint do not change, so the order need not be stored.
  * A group's grid is fitted when the loop reaches it, to the weights with all updates so far. It has the least rounding
    error, with column k weighted by D_k = 1 / U_kk². This is the cost of an error in k that remains after all later
    columns have compensated for it (arXiv 2602.02126 weights by H itself).
  * Afterwards a few passes visit every column again (coordinate_descent.py).
  * Columns that never saw an activation are rounded to nearest (the paper sets them to 0): other texts may use a
    channel that the calibration text does not use.
  * Damping 0.05 instead of 0.01: worse on the calibration tokens, better on held-out ones.

A layer of 2 outputs and 2 inputs, on the points ..., 0.1, 0.2, ... (scale 0.1, zero 8). The inputs are correlated: 0.8.

    >>> W = torch.tensor([[0.24, 0.13], [0.36, -0.12]])                                             # [out, in] = [2, 2]
    >>> H = torch.tensor([[1.0, 0.8], [0.8, 1.0]])                                                  # [in, in]
    >>> U, _, _ = factorise(H, H.diagonal(), torch.arange(2), damping=0.0)                          # [in, in]
    >>> U                                                            # column 1 gets -U_01 / U_00 = 0.8 of the error
    tensor([[ 1.6667, -1.3333],
            [ 0.0000,  1.0000]])
    >>> scale, zero = torch.full((1, 2), 0.1), torch.full((1, 2), 8, dtype=torch.uint8)             # [1, out] each
    >>> q, _ = round_columns(W.T.clone(), U, scale, zero, bits=4)                                   # [in, out]
    >>> scale.T * (q.T.float() - zero.T)                             # [out, in]: 0.13 became 0.13 + 0.8 · 0.04 = 0.162
    tensor([[ 0.2000,  0.2000],
            [ 0.4000, -0.2000]])

The first row loses e H eᵀ = 0.0020 with e = [0.04, -0.07]. Rounded to nearest, [0.2, 0.1], it would lose 0.0044.
"""

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
from llmq.core.device import numbers
from llmq.core.errors import WorkError
from llmq.core.settings import Gptq

# Multiples of the requested damping, and dtypes: tried in order until H is numerically positive definite.
_DAMPING_LADDER = ((1, torch.float32), *((multiple, torch.float64) for multiple in (1, 2, 5, 10, 100)))
_AT_ONCE = 128  # most columns with rank-1 updates among them; matmuls update the rest
_ROWS = 1024  # rows of H copied at once
_ROWS_PER_SOLVE = 4096  # rows of W solved at once on a CPU


def solve(problem: Problem, settings: Gptq) -> Solution:
    """Return codes for the stacked rows of one group of linears.

    Raises WorkError if H cannot be factorised even with a hundred times the damping.
    """
    assert problem.statistics is not None, "gptq needs input statistics"
    H = problem.statistics.H
    diagonal, dead = _without_dead_columns(H.diagonal())
    order = visiting_order(settings.order, diagonal, problem.grid.group_size)
    U, damping, fallbacks = factorise(H, diagonal, order, settings.damping, dead)
    together = rows_per_solve(H.device)
    strips = [problem.rows(start, start + together) for start in range(0, max(1, len(problem.W)), together)]
    solutions = [Solution(*_round_columns(strip, order, U, settings), damping, fallbacks) for strip in strips]
    del U  # makes room for another matrix of H's size
    if settings.passes:
        A = H.clone()
        A.diagonal().copy_(diagonal + damping * mean(diagonal))
        solutions = [descend(*pair, A, settings.passes) for pair in zip(strips, solutions, strict=True)]
    return joined(solutions)


def rows_per_solve(device: torch.device) -> int:
    """Return the number of rows of W to solve at once.

    On a CPU more rows are no faster (8192 rows of 2048 columns: 2.2 s, in one go 2.5 s; 2026-11-25) and take memory. A
    GPU solves all rows at once, because launches take most of its time.
    """
    return _ROWS_PER_SOLVE if device.type == "cpu" else sys.maxsize


def _without_dead_columns(
    diagonal: Float[Tensor, "columns"],
) -> tuple[Float[Tensor, "columns"], Int64[Tensor, ""]]:
    """Return the diagonal with its zeros set to the average, and their count. This makes these columns independent."""
    dead = diagonal == 0
    count = dead.sum()
    average = mean(diagonal) * len(diagonal) / (len(diagonal) - count).clamp(min=1)
    return diagonal.where(~dead, average.where(average != 0, 1.0)), count


def visiting_order(kind: str, diagonal: Float[Tensor, "columns"], group_size: int) -> Int64[Tensor, "columns"]:
    """Return the columns in the order of rounding. `kind` is `group`, `static` or `natural`."""
    if kind == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if kind == "static":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group_size)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    between = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (within + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size)[between].flatten()


def factorise(
    H: Float[Tensor, "n n"],
    diagonal: Float[Tensor, "n"],
    order: Int64[Tensor, "n"],
    damping: float,
    dead: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "n n"], float, list[str]]:
    """Return upper triangular U with (H + damping·mean(diag H)·I)⁻¹ = Uᵀ U, the damping used, and notes.

    It tries float32, then float64 with the same damping, then float64 with more damping. H is not modified.

    Args:
        diagonal: replaces the diagonal of H.
        order: of U's columns.
        dead: the number of columns that never saw an activation, for the notes. It may be on a GPU; it is read together
            with the success of the factorisation.
    """
    fallbacks: list[str] = []
    for multiple, dtype in _DAMPING_LADDER:
        raised = diagonal.double() + damping * multiple * mean(diagonal)
        U, good = _upper_factor_of_inverse(H, raised, order, torch.promote_types(dtype, H.dtype))
        is_good, unseen = numbers([good, 0 if dead is None else dead])
        if is_good and U is not None:
            if unseen:
                fallbacks.append(f"{unseen:.0f} input channels never active: rounded to nearest")
            return U.to(H.dtype), damping * multiple, fallbacks
        fallbacks.append(f"Cholesky failed in {str(dtype).removeprefix('torch.')} at damping {damping * multiple:g}")
    raise WorkError("; ".join(fallbacks) + ": the input statistics are not finite or not positive")


def _upper_factor_of_inverse(
    H: Tensor, diagonal: Tensor, order: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | bool]:
    """Return U for H with this diagonal, and whether it has one. The one copy of H is overwritten at each stage."""
    A, order = torch.empty(H.shape, dtype=dtype, device=H.device), order.flip(0)
    for rows in (slice(start, start + _ROWS) for start in range(0, len(H), _ROWS)):
        A[rows] = H.index_select(0, order[rows]).index_select(1, order)
    A.diagonal().copy_(diagonal[order])
    factor = cholesky_(A)
    if factor is None:
        return None, False
    U = _turn_(factor.invert_())
    # A sum is finite only if every term is.
    return U, torch.isfinite(U.sum(1)).all()


def _turn_(A: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Reverse both the rows and the columns of A in place and return it: all its values, read backwards."""
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
    """Round W column by column; return codes [out, in], and scale and zero [out, groups]."""
    size, columns, static = problem.grid.group_size, len(order), settings.order == "static"
    D = U.diagonal() ** -2
    # Transposed, a column of W is a contiguous row.
    Wt = problem.W.index_select(1, order).T.contiguous()
    Q = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
    scale = torch.empty(columns // size, Wt.shape[1], dtype=problem.scale_dtype, device=Wt.device)
    zero = torch.empty(scale.shape, dtype=problem.zero_dtype, device=Wt.device)
    group_of = order // size
    if static:
        fixed = problem.searched_grid(problem.groups(), D[torch.argsort(order)].view(-1, size))
        scale, zero = (tensor.T.contiguous() for tensor in fixed)
    block_size = max(1, settings.block_size // size) * size
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        Err = torch.empty_like(Wt[start:stop])
        for here in _within_groups(start, stop, size):
            turn = here.start // size
            if not static and here.start % size == 0:
                group = slice(here.start, here.start + size)
                scale[turn], zero[turn] = problem.searched_grid(Wt[group].T, D[group])
            groups = group_of[here] if static else slice(turn, turn + 1)
            Q[here], errors = round_columns(Wt[here], U[here, here], scale[groups], zero[groups], problem.grid.bits)
            Err[here.start - start : here.stop - start] = errors
            Wt[here.stop : stop].addmm_(U[here, here.stop : stop].T, errors, alpha=-1)
        Wt[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
    if not static:  # they were noted in the order of visits: to look up each place would be to wait for a GPU
        turns = torch.argsort(group_of[::size])
        scale, zero = scale[turns], zero[turns]
    return Q[torch.argsort(order)].T.contiguous(), scale.T.contiguous(), zero.T.contiguous()


def _within_groups(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield slices of at most _AT_ONCE columns, none across the border of two groups."""
    for first in range(start, stop, size):
        for at in range(first, first + size, _AT_ONCE):
            yield slice(at, min(at + _AT_ONCE, first + size))
