import pytest
import torch
from mixtures import Mixtures
from packed import dequantized_model, logits, pack, some_tokens
from torch import nn
from torch.nn.functional import linear

from llmq.core.errors import RequestError
from llmq.models.model_source import ModelSource
from llmq.runtime.load import load
from llmq.runtime.rounded_inputs import round_inputs


def by_hand(x):
    """Each token in 255 steps over its own range."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def with_rounded_inputs(model):
    """The same model with linears in its blocks that round what they get."""
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, module=module: linear(by_hand(x), module.weight, module.bias)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_what_enters_each_packed_linear_is_rounded_and_nothing_else(bits, llama, tmp_path):
    packed = pack(llama, tmp_path / "out", bits=bits)
    model = load(packed, "cpu", torch.float32)
    plain = logits(model, some_tokens())
    round_inputs(model)
    expected = logits(with_rounded_inputs(dequantized_model(llama, packed)), some_tokens())
    torch.testing.assert_close(logits(model, some_tokens()), expected, rtol=1e-4, atol=1e-4)
    assert float((expected - plain).abs().max()) > 1e-3


def test_of_an_original_model_all_linears_of_its_blocks_are_meant(llama):
    original, other = (ModelSource(str(llama)).load_all(torch.device("cpu"), torch.float32) for _ in range(2))
    round_inputs(original)
    expected = logits(with_rounded_inputs(other), some_tokens())
    torch.testing.assert_close(logits(original, some_tokens()), expected, rtol=1e-5, atol=1e-5)


def test_a_mixture_of_experts_is_refused(tmp_path):
    with pytest.raises(RequestError, match="mixture"):
        round_inputs(load(Mixtures(tmp_path)("mixtral"), "cpu"))
