"""PackedLinear inside models that other libraries move about."""

import copy
import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from accelerate import cpu_offload
from fake_gpu import GPU, FakeGpu, OnGpu
from packed import assert_same_weight, logits, pack, random_weight, some_tokens, with_real_zeros

import llmq
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import BITS
from llmq.formats import FORMATS
from llmq.formats.scheme import Scheme
from llmq.runtime.packed_linear import PackedLinear


def nbytes(model):
    """Bytes of all buffers by device. Counters are no part of a model."""
    sizes = Counter()
    for name, buffer in model.named_buffers():
        if not name.endswith("counters"):
            sizes[buffer.device.type] += buffer.nbytes
    return sizes


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_accelerate_takes_the_words_away_and_brings_them_back(tmp_path, llama, merge, offload_buffers):
    model = llmq.load(pack(llama, tmp_path / "packed"), "cpu", merge=merge)
    few, many = some_tokens(1, 5), some_tokens()
    expected = [logits(model, ids) for ids in (few, many)]
    words = sum(nbytes(model).values())
    moved = cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    for _ in range(2):
        assert all(torch.equal(logits(moved, ids), y) for ids, y in zip((few, many), expected, strict=True))
    away = nbytes(moved).get("meta", 0)
    assert away > 0.9 * words if offload_buffers else away == 0


def spread(weight):
    """The same weight with groups that take turns, as act-order files have them."""
    columns, groups = weight.q.shape[1], weight.scale.shape[1]
    return dataclasses.replace(weight, group_of=(torch.arange(columns) % groups).to(torch.int32))


def stored(kind, bits, symmetric):
    """A weight, the tensors that a file has of it, its format and its scheme."""
    weight, form = random_weight(32, 192, 3, bits, symmetric), FORMATS[kind.split()[0]]
    weight = spread(weight) if kind.endswith("act-order") else weight
    scheme = Scheme(bits, 64, symmetric, kind.endswith("act-order"), int(kind.startswith("gptq") and symmetric))
    return form.encode("linear", weight, scheme), form, scheme


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric"),
    [*itertools.product(["gptq", "gptq act-order", "compressed-tensors"], BITS, [True, False]), ("awq", 4, False)],
)
def test_tensors_on_a_gpu_are_decoded_and_laid_out_there(kind, bits, symmetric):
    tensors, form, scheme = stored(kind, bits, symmetric)
    expected = PackedLinear.from_codes(form.decode("linear", tensors, scheme)).state_dict()
    with FakeGpu() as gpu:
        tensors = {name: tensor.to(GPU) for name, tensor in tensors.items()}
        linear = PackedLinear.from_codes(form.decode("linear", tensors, scheme))
    assert gpu.on_cpu == []
    assert all(isinstance(buffer, OnGpu) for buffer in linear.buffers())
    found = {name: buffer.inner for name, buffer in linear.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_act_order_weights_compute_what_their_columns_say():
    weight = random_weight(48, 96, 3, symmetric=False)
    order = torch.arange(96).view(3, 32).T.flatten()  # groups take turns; sorting by group restores this very order
    group_of = (torch.arange(96, dtype=torch.int32) // 32)[order]
    shuffled = QuantizedWeight(weight.q[:, order], weight.scale, weight.zero, 4, group_of)
    linear, plain = PackedLinear.from_codes(shuffled), PackedLinear.from_codes(weight)
    assert torch.equal(linear.dequantize(), shuffled.dequantize())
    for tokens in (3, 70):  # the int4 path and the exact one
        x = torch.randn(tokens, 96)
        assert torch.equal(linear(x[:, order]), plain(x))


@torch.no_grad()
def test_a_copy_is_independent_of_its_original():
    linear = PackedLinear.from_codes(random_weight(48, 96, 3))
    x = torch.randn(2, 96)
    expected = linear(x)
    twin = copy.deepcopy(linear)
    linear.words0.zero_()
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin(torch.cat([x] * 40))[:2], twin(torch.cat([x] * 40))[2:4])


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("path", ["native", "no compiler", "learning"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_zero_points_count_in_every_product(bits, path, tokens, monkeypatch):
    if path == "no compiler":
        monkeypatch.setattr("llmq_kernels.cpu_native.library", lambda: None)
    weight = with_real_zeros(random_weight(40, 128, 2, bits))
    linear = PackedLinear.from_codes(weight, torch.randn(40))
    linear.exact = True  # torch's int4 operator rounds
    x = torch.randn(tokens, 128, requires_grad=path == "learning")
    expected = x @ weight.dequantize().T + linear.bias
    y = linear(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if path == "learning":
        mine, dense = (torch.autograd.grad(each.square().sum(), x)[0] for each in (y, expected))
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=0.02)  # they are up to 2000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_real_zero_points_come_back_also_after_moves_and_from_a_stack(dtype):
    one, two = (with_real_zeros(random_weight(16, 128, 2, dtype=dtype, seed=seed), seed) for seed in (1, 2))
    linears = [PackedLinear.from_codes(weight) for weight in (one, two)]
    torch.testing.assert_close(linears[0].dequantize(), one.dequantize(), rtol=1e-6, atol=1e-6)
    assert_same_weight(copy.deepcopy(linears[0]).to(torch.bfloat16).codes(), one)
    whole, x = PackedLinear.stack(linears), torch.randn(5, 128)
    assert torch.equal(whole(x), torch.cat([linear(x) for linear in linears], dim=-1))
    assert PackedLinear.stack([linears[0], PackedLinear.from_codes(random_weight(16, 128, 2, dtype=dtype))]) is None
    again = PackedLinear.from_codes(two)
    again.load_state_dict(linears[0].state_dict())
    assert torch.equal(again(x), linears[0](x))


STRIDED = {
    "transposed": lambda: torch.randn(2, 96, 5).transpose(1, 2),  # as state spaces and recurrent layers give them
    "sliced": lambda: torch.randn(2, 5, 200)[..., 7:103],
    "every second": lambda: torch.randn(2, 5, 192)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, 96).expand(2, 5, 96),
    "sequence last": lambda: torch.randn(5, 2, 96).transpose(0, 1),
    "flat": lambda: torch.randn(96, 5).T,
}


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("repeats", [1, 20], ids=["few", "many"])
@pytest.mark.parametrize("path", ["native", "int4", "plain", "learning"])
@torch.no_grad()
def test_inputs_may_lie_in_memory_in_any_way(path, repeats, kind, monkeypatch):
    """`plain` has 3 bits and no compiler; `learning` goes through the operator that has a gradient."""
    if path in ("int4", "plain"):
        monkeypatch.setattr("llmq_kernels.cpu_native.library", lambda: None)
    linear = PackedLinear.from_codes(random_weight(40, 96, 3, 3 if path == "plain" else 4), torch.randn(40))
    x = torch.cat([STRIDED[kind]()] * repeats)
    x = x if repeats > 1 else STRIDED[kind]()
    with torch.set_grad_enabled(path == "learning"):
        x = x.requires_grad_(path == "learning")
        y = linear(x)
    assert (linear._int4 is not None) == (path == "int4" and repeats == 1)
    assert (linear._native is not None) == (path == "native")
    assert torch.equal(y, linear(x.contiguous()))
    expected = torch.nn.functional.linear(x, linear.dequantize(), linear.bias)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)
