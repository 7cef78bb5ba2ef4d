"""PackedLinear inside models that other libraries move about."""

import copy
from collections import Counter

import pytest
import torch
from accelerate import cpu_offload
from packed import logits, pack, random_weight, some_tokens

import llmq
from llmq.core.quantized_weight import QuantizedWeight
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
