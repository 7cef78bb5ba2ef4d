"""GPTQ's inner loop over a few columns: in torch, and on a GPU in one Triton kernel."""

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from llmq.core import grid


def round_columns(
    W: Float[Tensor, "size out"],
    U: Float[Tensor, "size size"],
    scale: Float[Tensor, "#size out"],
    zero: UInt8[Tensor, "#size out"] | Float64[Tensor, "#size out"],
    bits: int,
) -> tuple[UInt8[Tensor, "size out"], Float[Tensor, "size out"]]:
    """Round column after column and move each error to later ones; return the codes, and Err for all further columns.

        Err_i = (w_i - ŵ_i) / U_ii        w_j -= U_ij Err_i   for j > i

    W is overwritten. It is transposed: its rows are the columns. If scale and zero have one row, it holds for all.
    """
    if W.is_cuda and W.dtype == torch.float32 and len(scale) == 1:
        from llmq_kernels import gptq_columns

        return gptq_columns.round_columns(W, U, scale[0], zero[0], bits)
    Q, Err = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)
    for i in range(len(W)):
        s, z = scale[min(i, len(scale) - 1)], zero[min(i, len(zero) - 1)]
        Q[i] = grid.quantize(W[i], s, z, bits)
        Err[i] = (W[i] - grid.dequantize(Q[i], s, z, W.dtype)) / U[i, i]
        W[i + 1 :].addr_(U[i, i + 1 :], Err[i], alpha=-1)
    return Q, Err
