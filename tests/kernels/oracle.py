"""What tests of Triton kernels share: where they run, and the float64 answer."""

from dataclasses import replace

import pytest
import torch
from weights import some_weight

# Triton's interpreter gets bfloat16 wrong without a word: it is for GPUs only.
FLOAT16 = [
    pytest.param(("cpu", torch.float16), id="interpreter", marks=pytest.mark.interpret),
    pytest.param(("cuda", torch.float16), id="fp16", marks=pytest.mark.gpu),
]
WHERE = [*FLOAT16, pytest.param(("cuda", torch.bfloat16), id="bf16", marks=pytest.mark.gpu)]

# Relative Frobenius error: y is rounded once, and W as well where it is made dense or scaled before the product.
ONE_ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
TWO_ROUNDINGS = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def move(weight, device):
    permutation = None if weight.permutation is None else weight.permutation.to(device)
    words = tuple(array.to(device) for array in weight.words)
    return replace(weight, words=words, grid=weight.grid.to(device), permutation=permutation)


def some_problem(where, M, N, K, bits=4, group=64, symmetric=True, seed=0):
    """(x, weight, bias) on a device; group -1 is one group per row."""
    device, dtype = where
    weight, _ = some_weight(N, K, 1 if group < 0 else K // group, bits, symmetric, seed=seed)
    generator = torch.Generator().manual_seed(seed + 2)
    x, bias = torch.randn(M, K, generator=generator), torch.randn(N, generator=generator)
    return x.to(device, dtype), move(weight, device), bias.to(device, dtype)


def expected(x, weight, bias=None):
    """x Wᵀ + bias in float64, by the formula, for x with its columns in the order of the codes."""
    codes, scale, zero = unpacked(weight)
    y = x.double().cpu() @ (scale * (codes - zero)).T
    return y if bias is None else y + bias.double().cpu()


def unpacked(weight):
    """float64 (codes, scale, zero), each [out, in], on the CPU."""
    from llmq_kernels.layout import unpack

    weight = move(weight, "cpu")
    grids = (grid.double().repeat_interleave(weight.group_size, dim=1) for grid in (weight.scale(), weight.zero()))
    return unpack(weight).double(), *grids


def relative_error(y, x, weight, bias=None):
    exact = expected(x, weight, bias)
    assert y.shape == exact.shape
    return float((y.double().cpu() - exact).norm() / exact.norm())
