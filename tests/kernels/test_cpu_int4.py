"""torch's int4 path for CPUs: when it applies, and that its result is the reference's up to bf16 rounding."""

import pytest
import torch
from llmq_kernels import cpu_int4, dequantize, matmul, pack
from llmq_kernels.layout import unpack


def some_weight(out=32, inputs=96, groups=3, bits=4, symmetric=True, dtype=torch.float16):
    generator = torch.Generator().manual_seed(out + inputs)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=generator).to(torch.uint8)
    scale = ((torch.rand(out, groups, generator=generator) - 0.5) / 8).to(dtype)
    zero = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**bits, (out, groups), generator=generator).to(torch.uint8)
    return pack(codes, scale, zero, bits)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("out", [16, 48, 112])
def test_it_takes_four_bit_weights_with_groups_it_knows(group_size, out):
    assert cpu_int4.supports(some_weight(out, 3 * group_size, 3))
    assert cpu_int4.supports(some_weight(out, group_size, 1, symmetric=False))


@pytest.mark.parametrize(
    "refused",
    [{"bits": 2}, {"bits": 3}, {"bits": 8}, {"out": 17}, {"out": 8}, {"groups": 1}, {"groups": 6}, {"groups": 96}],
    ids=str,
)
def test_it_leaves_every_other_weight_to_the_reference(refused):
    assert not cpu_int4.supports(some_weight(**refused))


def test_it_leaves_weights_on_other_devices_alone():
    weight = some_weight()
    meta = pack(torch.zeros(32, 96, dtype=torch.uint8), weight.scale.to("meta"), weight.zero.to("meta"), 4)
    assert not cpu_int4.supports(meta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "group_size", "groups"), [(16, 32, 1), (48, 32, 5), (112, 64, 3), (32, 128, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_the_result_is_the_references_up_to_bf16_rounding(tokens, out, group_size, groups, symmetric, dtype):
    weight = some_weight(out, group_size * groups, groups, symmetric=symmetric)
    x = torch.randn(tokens, weight.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = cpu_int4.matmul(x, cpu_int4.prepare(weight))
    assert y.dtype == dtype
    error = (y.double() - matmul(x.double(), weight)).abs()
    assert bool((error <= bf16_rounding(x.double(), weight)).all())


def bf16_rounding(x, weight):
    """What rounding x, scale, offset and the result to bf16 (2**-9 each) can change in an output."""
    dense = dequantize(weight, torch.float64).abs()
    offset = ((weight.zero.double() - 8) * weight.scale.double()).abs().repeat_interleave(weight.group_size, dim=1)
    # x and y carry one rounding each; w = (code - 8) * scale + offset carries two, of terms that may both exceed w.
    return 1.01 * 2**-9 * x.abs() @ (3 * dense + 2 * offset).T


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_that_bf16_holds_come_out_exact(symmetric):
    weight = some_weight(48, 64, 2, symmetric=symmetric)
    weight = pack(unpack(weight), weight.scale.sign() * 2, weight.zero, 4)
    x = torch.eye(64)  # picks single weights: nothing is summed
    y = cpu_int4.matmul(x, cpu_int4.prepare(weight), bias=torch.arange(48.0))
    assert torch.equal(y, dequantize(weight, torch.float32).T + torch.arange(48.0))


def test_leading_dimensions_of_the_input_are_kept():
    weight = cpu_int4.prepare(some_weight())
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))
    y = cpu_int4.matmul(x, weight)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y.flatten(0, 1), cpu_int4.matmul(x.flatten(0, 1), weight))
    assert cpu_int4.matmul(x[0, 0], weight).shape == (32,)
