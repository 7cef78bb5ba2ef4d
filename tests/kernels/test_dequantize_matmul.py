"""Dequantizing into scratch before the library's matmul: the scratch is exact, the product float64's up to rounding."""

import itertools

import pytest
import torch
from llmq_kernels import dequantize
from llmq_kernels import dequantize_matmul as module
from oracle import TWO_ROUNDINGS, WHERE, move, relative_error, some_problem
from weights import BITS

GROUPS = {16: 272, 32: 480, 64: 448, 128: 384, 256: 768, -1: 129}
"""Inputs for every size of group, most of them no whole blocks."""


def rounded_once(weight, dtype):
    """The float32 product scale * (code - zero), rounded to `dtype`."""
    return dequantize(move(weight, "cpu"), torch.float32).to(dtype)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "symmetric", "group"), itertools.product(BITS, (True, False), GROUPS))
def test_dequantized_rows_are_the_float32_products_rounded_once(bits, symmetric, group, where):
    _, weight, _ = some_problem(where, 1, 70, GROUPS[group], bits, group, symmetric)
    buffer = torch.full((9, GROUPS[group] + 3), float("nan"), dtype=where[1], device=where[0])
    module.dequantize_rows(weight, buffer[1:-1, : GROUPS[group]], 60)
    assert torch.equal(buffer[1:-1, : GROUPS[group]].cpu(), rounded_once(weight, where[1])[60:67])
    assert bool(buffer[:, GROUPS[group] :].isnan().all() & buffer[[0, -1]].isnan().all())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rows", [64, 128])
def test_any_row_may_come_first(rows, where):
    _, weight, _ = some_problem(where, 1, 200, 480, 4, 16, symmetric=False)
    for first in range(0, 200, rows):
        W = torch.full((min(rows, 200 - first), 480), float("nan"), dtype=where[1], device=where[0])
        module.dequantize_rows(weight, W, first)
        assert torch.equal(W.cpu(), rounded_once(weight, where[1])[first : first + rows])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 200), (65, 129), (64, 64), (200, 136)])
def test_odd_shapes_have_all_their_rows_and_columns(N, K, where):
    for bits in BITS:
        _, weight, _ = some_problem(where, 1, N, K, bits, -1, symmetric=False)
        W = torch.full((N, K), float("nan"), dtype=where[1], device=where[0])
        module.dequantize_rows(weight, W, 0)
        assert torch.equal(W.cpu(), rounded_once(weight, where[1]))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("scratch_bytes", "rows"), [(1, [64, 64, 64, 8]), (128 * 2 * 480, [128, 72]), (20 << 20, [200])], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_result_is_float64s_whatever_fits_the_scratch(biased, scratch_bytes, rows, where, monkeypatch):
    monkeypatch.setattr(module, "_SCRATCH_BYTES", scratch_bytes)
    monkeypatch.setattr(module, "_LEAST_OUTPUTS", 1)
    chunks = count_chunks(monkeypatch)
    x, weight, bias = some_problem(where, 33, 200, 480, 3, 32, symmetric=False)
    bias = bias if biased else None
    y = module.dequantize_matmul(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert relative_error(y, x, weight, bias) < TWO_ROUNDINGS[where[1]]
    assert [len(W) for W in chunks] == rows


def count_chunks(monkeypatch):
    """The pieces of scratch that are filled from now on."""
    fill, chunks = module.dequantize_rows, []

    def remember(weight, W, first_row):
        chunks.append(W)
        fill(weight, W, first_row)

    monkeypatch.setattr(module, "dequantize_rows", remember)
    return chunks


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 16), (4, 128), (8, -1)])
def test_inputs_and_outputs_of_odd_number_are_multiplied(bits, group, where):
    K = {64: 448, 16: 272, 128: 384, -1: 129}[group]
    x, weight, bias = some_problem(where, 7, 65, K, bits, group)
    for tokens in (x, x[:1]):
        y = module.dequantize_matmul(tokens, weight, bias)
        assert relative_error(y, tokens, weight, bias) < TWO_ROUNDINGS[where[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_the_asm_and_its_twin_agree_to_the_bit(bits, symmetric, dtype, monkeypatch):
    x, weight, bias = some_problem(("cuda", dtype), 300, 200, 2048 + 64, bits, 64, symmetric)
    asm = module.dequantize_matmul(x, weight, bias)
    assert relative_error(asm, x, weight, bias) < TWO_ROUNDINGS[dtype]
    monkeypatch.setattr(module, "uses_asm", lambda x: False)
    assert torch.equal(module.dequantize_matmul(x, weight, bias), asm)
