"""Mixtures of experts go through transformers and back, although it does not know the linears of single experts."""

import pytest
import torch
from hf_checkpoints import opened, quantization
from mixtures import Mixtures, stored
from packed import logits, some_tokens

import llmq
from llmq.runtime import transformers_plugin
from llmq.runtime.plugin_experts import return_experts

# One block of two: the experts of the other stay in float, in the layout of the original.
CASES = [
    ("mixtral", "", "auto"),
    ("mixtral", "1", "auto"),
    ("gpt_oss", "", "auto"),
    ("gpt_oss", "1", "auto"),
    ("granitemoe", "1", "auto"),
    ("llama4_text", "", "auto"),
    ("nemotron_h", "", "auto"),
    ("dbrx", "", "auto"),
    ("dbrx", "1", "auto"),
    ("mixtral", "", "mlx"),
    ("qwen3_moe", "", "mlx"),  # experts are stacked
]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    return Mixtures(tmp_path_factory.mktemp("mixtures"))


@pytest.mark.parametrize(("name", "blocks", "form"), CASES)
def test_transformers_opens_what_llmq_load_does_and_either_is_saved_as_it_was(mixtures, tmp_path, name, blocks, form):
    directory = mixtures(name, blocks=blocks, format=form)
    ours = llmq.load(directory, "cpu", torch.float32)
    theirs, notes = opened(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(logits(theirs, some_tokens()), logits(ours, some_tokens()))
    for route, model in {"ours": ours, "theirs": theirs}.items():
        model.save_pretrained(tmp_path / route)
        assert stored(tmp_path / route) == stored(directory)
        assert quantization(tmp_path / route) == quantization(directory)


def test_experts_in_float_come_in_the_dtype_that_the_caller_asked_for(mixtures):
    model = opened(mixtures("gpt_oss", blocks="1"), dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("reserved" in name for name, _ in model.named_buffers())
    assert torch.isfinite(logits(model, some_tokens(1, 5))).all()


def test_bytes_are_reserved_for_packed_experts_and_for_those_in_float(mixtures, monkeypatch):
    counted = []

    def counting(model, taken):
        counted.extend(buffer.numel() for name, buffer in model.named_buffers() if "experts" in name)
        return return_experts(model, taken)

    monkeypatch.setattr(transformers_plugin, "return_experts", counting)
    opened(mixtures("mixtral", blocks="1"), dtype=torch.float32)
    weights = 4 * 3 * 128 * 64
    assert counted == [4 * weights, weights // 2]
