"""torch's int4 path for CPUs: when it applies, and that its result is the reference's up to bf16 rounding."""

from dataclasses import replace

import pytest
import torch
import weights
from llmq_kernels import PackedWeight, cpu_int4, dequantize, matmul, pack
from llmq_kernels.layout import unpack
from llmq_kernels.reference import permuted


def some_weight(out=32, inputs=96, groups=3, bits=4, symmetric=True):
    return weights.some_weight(out, inputs, groups, bits, symmetric)[0]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("out", [16, 48, 17])
def test_it_takes_four_bit_weights_with_groups_it_knows(group_size, out):
    assert cpu_int4.supports(some_weight(out, 3 * group_size, 3))
    assert cpu_int4.supports(some_weight(out, group_size, 1, symmetric=False))


@pytest.mark.parametrize(
    "refused",
    [{"bits": 2}, {"bits": 3}, {"bits": 8}, {"groups": 1}, {"groups": 6}, {"groups": 96}],
    ids=str,
)
def test_it_leaves_every_other_weight_to_the_reference(refused):
    assert not cpu_int4.supports(some_weight(**refused))


def test_it_leaves_weights_on_other_devices_alone():
    weight = some_weight()
    words, grid = tuple(words.to("meta") for words in weight.words), weight.grid.to("meta")
    assert cpu_int4.supports(PackedWeight(weight.words, weight.grid, 4, 32, 96, True))
    assert not cpu_int4.supports(PackedWeight(words, grid, 4, 32, 96, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("out", "group_size", "groups"), [(16, 32, 1), (48, 32, 5), (40, 32, 3), (112, 64, 3), (33, 128, 2)]
)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_the_result_is_the_references_up_to_bf16_rounding(tokens, out, group_size, groups, symmetric, dtype):
    weight = some_weight(out, group_size * groups, groups, symmetric=symmetric)
    x = torch.randn(tokens, weight.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = cpu_int4.matmul(x, cpu_int4.prepare(weight))
    assert y.dtype == dtype
    error = (y.double() - matmul(x.double(), weight)).abs()
    assert bool((error <= bf16_rounding(x.double(), weight)).all())


@pytest.mark.parametrize("out", [16, 64, 200, 208, 240])
def test_rearranging_a_few_rows_at_a_time_gives_what_all_at_once_give(out, monkeypatch):
    weight = some_weight(out, symmetric=False)
    codes = torch.nn.functional.pad(unpack(weight).to(torch.int32), (0, 0, 0, -out % 16))
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    monkeypatch.setattr(cpu_int4, "_CODES", 1)
    assert torch.equal(cpu_int4.prepare(weight).packed, whole)


def bf16_rounding(x, weight):
    """What rounding x, scale, offset and the result to bf16 (2**-9 each) can change in an output."""
    dense = dequantize(weight, torch.float64).abs()
    offset = ((weight.zero().double() - 8) * weight.scale().double()).abs().repeat_interleave(weight.group_size, dim=1)
    # x and y carry one rounding each; w = (code - 8) * scale + offset carries two, of terms that may both exceed w.
    return 1.01 * 2**-9 * x.abs() @ (3 * dense + 2 * offset).T


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_that_bf16_holds_come_out_exact(symmetric):
    weight = some_weight(48, 64, 2, symmetric=symmetric)
    weight = pack(unpack(weight), weight.scale().sign() * 2, weight.zero(), 4)
    x = torch.eye(64)  # picks single weights: nothing is summed
    y = cpu_int4.matmul(x, cpu_int4.prepare(weight), bias=torch.arange(48.0))
    assert torch.equal(y, dequantize(weight, torch.float32).T + torch.arange(48.0))


@pytest.mark.parametrize("out", [32, 24])
def test_leading_dimensions_of_the_input_are_kept(out):
    weight = cpu_int4.prepare(some_weight(out))
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))
    y = cpu_int4.matmul(x, weight)
    assert y.shape == (2, 3, out)
    assert torch.equal(y.flatten(0, 1), cpu_int4.matmul(x.flatten(0, 1), weight))
    assert cpu_int4.matmul(x[0, 0], weight).shape == (out,)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_act_order_weight_takes_its_inputs_in_the_packed_order(symmetric):
    weight = some_weight(48, 128, 4, symmetric=symmetric)
    plain = pack(unpack(weight), weight.scale().sign() * 2, weight.zero(), 4)
    weight = replace(plain, permutation=torch.randperm(128, generator=torch.Generator().manual_seed(0)))
    y = cpu_int4.matmul(permuted(torch.eye(128), weight), cpu_int4.prepare(weight))  # picks single weights
    assert torch.equal(y, dequantize(weight, torch.float32).T)


def test_no_tokens_give_no_results():
    y = cpu_int4.matmul(torch.zeros(2, 0, 96), cpu_int4.prepare(some_weight()), bias=torch.ones(32))
    assert y.shape == (2, 0, 32)


def test_inputs_may_lie_in_memory_in_any_order():
    weight, x = cpu_int4.prepare(some_weight()), torch.randn(1, 96, 7).transpose(1, 2)
    assert torch.equal(cpu_int4.matmul(x, weight), cpu_int4.matmul(x.contiguous(), weight))
