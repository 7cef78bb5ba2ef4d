"""The GPU's inner loop of GPTQ against torch's, code for code."""

import pytest
import torch
from oracle import FLOAT16

from llmq.algorithms import gptq_columns as columns
from llmq.core import grid


def some_columns(G, rows, bits, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(G, rows, generator=generator)
    # Off the diagonal small, as in a factor of a real H^-1, or rounding errors would grow from column to column.
    U = (0.3 / G**0.5 * torch.randn(G, G, generator=generator)).triu(1)
    U += torch.diag(0.5 + torch.rand(G, generator=generator))
    scale, zero = grid.choose_scale_zero(W.T, bits, symmetric, torch.float16)
    return W, U, scale, zero


KINDS = [(2, 16, 33, True), (2, 16, 33, False), (3, 37, 16, True), (4, 64, 7, False), (4, 1, 1, True)]
KINDS += [(3, 128, 17, False), pytest.param(8, 128, 17, True, marks=pytest.mark.smoke)]


@pytest.mark.parametrize("where", FLOAT16)
@pytest.mark.parametrize(("bits", "G", "rows", "symmetric"), KINDS)
def test_codes_are_torchs_and_errors_too(bits, G, rows, symmetric, where):
    from llmq_kernels import gptq_columns

    W, U, scale, zero = some_columns(G, rows, bits, symmetric)
    expected, errors = columns.round_columns(W.clone(), U, scale[None], zero[None], bits)
    device = where[0]
    Q, Err = gptq_columns.round_columns(W.to(device), U.to(device), scale.to(device), zero.to(device), bits)
    differing = int((Q.cpu() != expected).sum())
    # A GPU may fuse a product and a difference, and a tie then falls the other way.
    assert differing <= (0 if device == "cpu" else max(2, 0.001 * Q.numel()))
    same = (Q.cpu() == expected).all(0)  # rows that agree in every code
    torch.testing.assert_close(Err.cpu()[:, same], errors[:, same], rtol=1e-4, atol=1e-5)
