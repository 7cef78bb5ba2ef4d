"""How the operator and the layers that call it treat what they are given: dtypes, autocast, traces, other buffers."""

import copy
import itertools
import warnings

import pytest
import torch
from llmq_kernels import matmul, new_counters, op, packed_linear
from llmq_kernels.choose import Device
from oracle import ONE_ROUNDING, relative_error, some_problem
from packed import random_weight
from weights import BITS, shuffled_groups, some_weight

from llmq.runtime.packed_linear import PackedLinear


def linear(x, weight, bias=None):
    return packed_linear(x, weight, bias, new_counters(x.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_the_operator_sums_in_float32_on_a_cpu(bits, symmetric, dtype):
    bound = {torch.float32: 1e-6} | ONE_ROUNDING
    for groups in (1, 21):
        x, weight, bias = some_problem(("cpu", dtype), 5, 33, 336, bits, 336 // groups, symmetric)
        assert relative_error(linear(x, weight, bias), x, weight, bias) < bound[dtype]
        assert relative_error(linear(x, weight), x, weight) < bound[dtype]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_the_operator_is_the_reference_without_a_compiler(bits, symmetric, dtype):
    for groups in (1, 3, 7, 21):
        x, weight, bias = some_problem(("cpu", dtype), 5, 33, 336, bits, 336 // groups, symmetric)
        assert torch.equal(linear(x, weight, bias), matmul(x, weight, bias))
        assert torch.equal(linear(x, weight), matmul(x, weight))


@pytest.mark.parametrize(
    ("dtype", "group", "arch", "said"),
    [
        (torch.float32, 32, 90, "float16 and bfloat16, not float32"),
        (torch.float16, 24, 90, "a power of two from 16 on, not 24"),
        (torch.float16, 32, 75, "this GPU is older"),
    ],
)
def test_a_call_that_has_no_kernel_is_told_once(dtype, group, arch, said, monkeypatch):
    monkeypatch.setattr(op, "describe", lambda device: Device("NVIDIA Nothing", arch, 4, 232448))
    op._warn_once.cache_clear()
    x, weight, bias = some_problem(("cpu", dtype), 2, 33, 96, group=group)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = [op.launched(x, weight, bias, new_counters("cpu")) for _ in range(2)]
    assert len(told) == 1
    assert said in str(told[0].message)
    assert "slow" in str(told[0].message)
    assert torch.equal(y[0], matmul(x, weight, bias))


def test_a_trace_holds_the_operator_and_not_the_numbers_of_one_call():
    layer = PackedLinear.from_codes(random_weight(48, 96, 3))
    traced = torch.jit.trace(layer, torch.randn(2, 96))
    x = torch.randn(2, 96)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("replaced", ["words1", "permutation"])
def test_any_buffer_may_be_replaced_after_the_first_call(replaced):
    layers = [
        PackedLinear(some_weight(32, 96, 3, 3, group_of=shuffled_groups(96, 3, seed), seed=seed)[0]) for seed in (0, 1)
    ]
    x = torch.randn(2, 96)
    layers[0](x)
    layers[0]._buffers[replaced] = layers[1]._buffers[replaced]
    torch.testing.assert_close(layers[0](x), x @ copy.deepcopy(layers[0]).dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learning", [False, True])
def test_autocast_is_followed_as_by_a_linear_of_torch(learning):
    layer, x = PackedLinear.from_codes(random_weight(48, 96, 3)), torch.randn(3, 96, requires_grad=learning)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
