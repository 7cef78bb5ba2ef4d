"""GPTQ's inner loop: round a few columns, at most 128 or so, each error moved onto the later ones.

One program has BR rows; rows do not interact. Its columns stay in registers from first to last:

    W [rows, G]   .─────────────────────.
               BR │ w_0 │ w_1 │ … │ w_G │   for i: q_i = round(w_i / scale + zero),  e_i = (w_i - ŵ_i) / U_ii
                  '─────────────────────'          w_j -= e_i · U_ij  for j > i

Grids come from outside, one per row, and so does what follows: the errors' way to all other columns is one matmul.
"""

# Triton compiles the kernels: their parameters have no Python types, their branches are chosen while compiling.
# pyright: reportMissingParameterType=false, reportPossiblyUnboundVariable=false, reportUnusedVariable=false
# Triton's dialect, whose constants are of no type that a checker knows:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BR = 16


@triton.jit
def round_columns_kernel(
    W, U, scale, zero, Q, Err, rows, most,
    G: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Round BR rows per program. Reads W [G, rows]; writes Q uint8 and Err [G, rows]. COLUMNS: G, padded."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < G)[None, :]
    at = column.to(tl.int64)[None, :] * rows + row[:, None]
    w = tl.load(W + at, mask=inside, other=0.0)
    s = tl.load(scale + row, mask=row < rows, other=1.0)
    z = tl.load(zero + row, mask=row < rows, other=0.0)
    codes = tl.zeros((BR, COLUMNS), dtype=tl.float32)
    errors = tl.zeros((BR, COLUMNS), dtype=tl.float32)
    for i in range(G):
        here = (column == i)[None, :]
        w_i = tl.sum(tl.where(here, w, 0.0), 1)
        # Round half to even, as torch does: adding 1.5 · 2**23 leaves no room for a fraction.
        q = tl.minimum(tl.maximum(tl.div_rn(w_i, s) + z, -1.0), most + 1.0)
        q = (q + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(q, 0.0), most)
        u = tl.load(U + i * G + column, mask=(column < G) & (column >= i), other=0.0)
        u_ii = tl.sum(tl.where(column == i, u, 0.0), 0)
        e = tl.div_rn(w_i - s * (q - z), u_ii)
        codes = tl.where(here, q[:, None], codes)
        errors = tl.where(here, e[:, None], errors)
        w = w - e[:, None] * tl.where(column > i, u, 0.0)[None, :]
    tl.store(Q + at, codes.to(tl.uint8), mask=inside)
    tl.store(Err + at, errors, mask=inside)


def round_columns(W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes uint8 and errors float32, [G, rows], of columns that share their grids.

    Args:
        W: [G, rows] float32, transposed weights.
        U: [G, G] float32, upper triangular.
        scale, zero: [rows], of any dtype.
    """
    G, rows = W.shape
    W = W.contiguous()
    Q, Err = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)
    round_columns_kernel[(triton.cdiv(rows, _BR),)](
        W, U.contiguous(), scale.float(), zero.float(), Q, Err, rows, 2**bits - 1,
        G=G, COLUMNS=triton.next_power_of_2(G), BR=_BR, num_warps=4,
    )  # fmt: skip
    return Q, Err
