"""The reference matmul against float64: the oracle that later kernels are held to must itself be held to something."""

import itertools

import pytest
import torch
from llmq_kernels import dequantize, matmul, pack, reference
from llmq_kernels.layout import unpack
from weights import BITS, shuffled_groups, some_weight

# (out, in, groups): one of everything, primes, odd sizes in groups, and a layer with a tail
SHAPES = [(1, 1, 1), (13, 37, 1), (7, 33, 11), (31, 96, 3), (17, 129, 43), (9, 160, 10), (5, 576, 9)]
# Relative to the sum of magnitudes |x| @ |W|: one rounding of W, of each product and of the result in the dtype.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def assert_close(y, x, dense, bias=None):
    """y is x @ denseᵀ + bias up to the rounding of its dtype."""
    expected, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= TOLERANCE[y.dtype] * size + 1e-7).all())


@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, [True, False]))
@pytest.mark.parametrize(("out", "inputs", "groups"), SHAPES)
def test_dequantize_is_the_formula_exactly(out, inputs, groups, bits, symmetric):
    weight, dense = some_weight(out, inputs, groups, bits, symmetric)
    assert bool((weight.scale() < 0).any())
    assert torch.equal(dequantize(weight, torch.float64), dense)
    assert torch.equal(dequantize(weight, torch.float32).double(), dense)
    assert torch.equal(dequantize(weight, torch.float16), dense.to(torch.float16))


@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, [True, False]))
@pytest.mark.parametrize(("inputs", "groups"), [(37, 1), (96, 3), (129, 43), (160, 10)])
def test_act_order_weights_have_their_columns_in_the_order_of_the_inputs(inputs, groups, bits, symmetric):
    weight, dense = some_weight(31, inputs, groups, bits, symmetric, group_of=shuffled_groups(inputs, groups))
    assert torch.equal(dequantize(weight, torch.float64), dense)
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    assert_close(matmul(x, weight), x, dense)
    assert torch.equal(reference.permuted(x, weight), x[:, weight.permutation])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, [True, False]))
@pytest.mark.parametrize(("out", "inputs", "groups"), SHAPES)
def test_matmul_is_the_product_with_the_dequantized_weight(out, inputs, groups, bits, symmetric, dtype):
    weight, dense = some_weight(out, inputs, groups, bits, symmetric)
    for tokens in (1, 2, 7, 33):
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y = matmul(x, weight)
        assert y.dtype == dtype
        assert_close(y, x, dense)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_bias_is_added(dtype):
    weight, dense = some_weight(31, 96, 3, 4)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(7, 96, generator=generator).to(dtype), torch.randn(31, generator=generator).to(dtype)
    assert_close(matmul(x, weight, bias), x, dense, bias)


def test_leading_dimensions_of_the_input_are_kept():
    weight, dense = some_weight(13, 37, 1, 2)
    x = torch.randn(2, 3, 5, 37, generator=torch.Generator().manual_seed(0))
    y = matmul(x, weight)
    assert y.shape == (2, 3, 5, 13)
    assert_close(y.flatten(0, 2), x.flatten(0, 2), dense)
    assert matmul(x[0, 0, 0], weight).shape == (13,)


@pytest.mark.parametrize("chunk", [1, 5 * 96, 7 * 96 + 1, 31 * 96])
@pytest.mark.parametrize("bits", BITS)
def test_rows_in_chunks_give_what_all_rows_at_once_give(monkeypatch, bits, chunk):
    # Integers: sums are exact, so that the order in which the matmul adds cannot hide or fake a difference.
    weight, _ = some_weight(31, 96, 3, bits, symmetric=False)
    weight = pack(unpack(weight), weight.scale().sign(), weight.zero(), bits)
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randint(-9, 9, (7, 96), generator=generator).float(), torch.arange(31.0)
    whole = matmul(x, weight, bias)
    assert torch.equal(whole, x @ dequantize(weight, torch.float32).T + bias)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk)
    assert torch.equal(matmul(x, weight, bias), whole)


def test_matmul_changes_neither_its_input_nor_the_weight():
    weight, _ = some_weight(7, 33, 11, 3, symmetric=False)
    x = torch.ones(2, 33)
    before = [tensor.clone() for tensor in (*weight.words, weight.grid)]
    matmul(x, weight)
    assert torch.equal(x, torch.ones(2, 33))
    assert all(torch.equal(a, b) for a, b in zip(before, (*weight.words, weight.grid), strict=True))


def test_no_tokens_give_no_results():
    weight, _ = some_weight(7, 33, 11, 3)
    assert matmul(torch.zeros(2, 0, 33), weight, torch.ones(7)).shape == (2, 0, 7)
