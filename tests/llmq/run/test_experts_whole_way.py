"""Mixtures of experts go the whole way: quantize, verify, load, generate, convert."""

import pytest
import torch
from architectures.tiny_models import save_tiny
from packed import dequantized_model, logits, some_tokens
from small_runs import run

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.run.convert import ConvertConfig, convert
from llmq.verification.compare import VerifyConfig, verify

_NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "gemma4_text@moe", "llama4_text")
# gptq takes five times as long as rtn. These two shapes have biases and scores before the experts.
SHAPES = {name: "gptq" if name in ("gpt_oss", "llama4_text") else "rtn" for name in _NAMES}
IDS = some_tokens()
TEXT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_mixture_goes_the_whole_way(name, text_file, tmp_path):
    source = tmp_path / "source"
    save_tiny(name, source)
    packed = run(source, text_file, tmp_path / "packed", method=SHAPES[name])
    facts = verify(VerifyConfig(packed, reference=str(source), text=str(text_file), limit=1, sequence_length=32))
    assert sum(".experts." in layer for layer in facts["layer_errors"]) >= 4 * 3  # of a block with four experts
    assert 0 < max(facts["layer_errors"].values()) < 0.5  # another tensor would give more than 1
    model = llmq.load(packed, "cpu", torch.float32, merge=True)
    wanted = logits(model, IDS)
    dense = dequantized_model(source, packed)
    assert (wanted - logits(dense, IDS)).norm() / wanted.norm() < 1e-6
    ids = llmq.fast_generate(model, IDS[:1, :8], **TEXT).sequences
    assert torch.equal(ids, model.generate(IDS[:1, :8], **TEXT))
    assert torch.equal(ids, dense.generate(IDS[:1, :8], **TEXT))
    directory = packed
    # transformers would not find the experts of gpt-oss and Gemma 4 in compressed-tensors
    is_gptq = Checkpoint(packed).format.METHOD == "gptq"
    for stored_as in ("awq", "gptq") if is_gptq else ("gptq", "awq", "compressed-tensors"):
        directory = convert(ConvertConfig(directory, tmp_path / stored_as, stored_as))
        assert torch.equal(logits(llmq.load(directory, "cpu", torch.float32), IDS), wanted)
    assert (directory / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
