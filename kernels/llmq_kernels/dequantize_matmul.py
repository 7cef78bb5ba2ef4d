"""y = x Wᵀ + bias by dequantizing into a scratch buffer and multiplying with the vendor's library: for many tokens.

With a few hundred tokens or more the tensor cores are the limit, the library's kernel reaches what nothing in Triton
does, and writing W once costs little beside it. The scratch holds some rows of W at a time: small enough to stay in the
GPU's second-level cache between being written and being read.
"""

# Triton compiles the kernels: their parameters have no Python types, their branches are chosen while compiling.
# pyright: reportMissingParameterType=false, reportPossiblyUnboundVariable=false, reportUnusedVariable=false
# Triton's dialect, whose constants are of no type that a checker knows:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportRedeclaration=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.layout import PackedWeight, block_of
from llmq_kernels.packed_matmul import grid_at, group_of, uses_asm
from llmq_kernels.planes import in_two, low_width, plane_values, planes_of

_SCRATCH_BYTES = 20 << 20  # a third of an H200's L2, not measured yet
# But as many rows as give each multiprocessor one of the library's tiles, 128 x 128 of y: not measured either.
_LEAST_OUTPUTS = 132 * 128 * 128
_BN = 64


@triton.jit
def dequantize_kernel(
    words, tops, grid, W,
    N, K, first_row, rows, word_stride, top_stride, W_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, SYMMETRIC: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Compute W[row - first_row, k] = scale * (code - zero). Program: BN rows from first_row on, a block of K."""
    PER_WORD: tl.constexpr = 16 // low_width(BITS)
    PLANES: tl.constexpr = planes_of(BITS)
    BLOCK: tl.constexpr = PLANES * PLANE
    i, block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    row, c = tl.minimum(first_row + i, N - 1), tl.arange(0, PLANE)
    top = tl.load(tops + row[:, None] * top_stride + block * PLANE + c[None, :]) if in_two(BITS) else 0
    for p in tl.static_range(PLANES):
        if p % PER_WORD == 0:
            column = (block * (PLANES // PER_WORD) + p // PER_WORD) * PLANE
            word = tl.load(words + row[:, None] * word_stride + column + c[None, :])
        if p == 0 or (GROUP != 0 and p * PLANE % GROUP == 0):
            scale, zero = grid_at(grid, row, block * BLOCK + p * PLANE, N, K, GROUP, EVEN_K, SYMMETRIC)
        k = block * BLOCK + p * PLANE + c
        values = plane_values(word, top, zero, p, BITS, SYMMETRIC, W.dtype.element_ty, ASM).to(tl.float32)
        inside = (i < rows)[:, None] if EVEN_K else (i < rows)[:, None] & (k < K)[None, :]
        at = W + i.to(tl.int64)[:, None] * W_stride + k[None, :]
        tl.store(at, (values * scale[:, None]).to(W.dtype.element_ty), mask=inside)


def dequantize_rows(weight: PackedWeight, W: Tensor, first_row: int) -> None:
    """Write rows first_row on, columns in the packed order, to W [rows, K], whose rows may be padded."""
    words, tops = weight.words[0], weight.words[-1]
    block = block_of(weight.bits, weight.plane)
    blocks = tops.shape[1] // weight.plane
    dequantize_kernel[(triton.cdiv(len(W), _BN), blocks)](
        words, tops, weight.grid, W,
        weight.out_features, weight.in_features, first_row, len(W),
        words.shape[1], tops.shape[1], W.stride(0),
        BITS=weight.bits, GROUP=group_of(weight), PLANE=weight.plane, SYMMETRIC=weight.symmetric,
        EVEN_K=block * blocks == weight.in_features, BN=_BN, ASM=uses_asm(W),
    )  # fmt: skip


def dequantize_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return y [M, N] for x [M, K], with the columns of x in the weight's order."""
    (M, K), N = x.shape, weight.out_features
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    rows = min(N, max(_SCRATCH_BYTES // (2 * K), _LEAST_OUTPUTS // M) // _BN * _BN or _BN)
    scratch = torch.empty(rows, -(-K // 8) * 8, dtype=x.dtype, device=x.device)
    for first in range(0, N, rows):
        W = scratch[: min(rows, N - first), :K]
        dequantize_rows(weight, W, first)
        torch.mm(x, W.T, out=y[:, first : first + len(W)])
    return y if bias is None else y.add_(bias)
