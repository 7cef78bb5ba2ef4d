"""Hybrids and models with a tower for pictures go the whole way: quantize, verify, load, generate, convert.

That GPTQ sees the right inputs is tested by test_architecture_kinds.py.
"""

import json

import pytest
import torch
from architectures.tiny_models import save_tiny
from packed import logits, some_tokens
from small_runs import run

import llmq
from llmq.run.convert import ConvertConfig, convert
from llmq.verification.compare import VerifyConfig, verify

SHAPES = [
    "falcon_h1",
    "gemma3",
    "gemma4_text",
    "granitemoehybrid@dense",
    "lfm2",
    "mamba2",
    "qwen3_5@image",
    "qwen3_vl",
]
IDS = some_tokens()
PICTURES = {"image_mean": [0.5], "size": {"height": 28}}  # what a processor needs is in a file beside the weights


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_goes_the_whole_way(name, text_file, tmp_path):
    source = tmp_path / "source"
    original = save_tiny(name, source)
    (source / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    packed = run(source, text_file, tmp_path / "packed", method="rtn")
    facts = verify(VerifyConfig(packed, reference=str(source), text=str(text_file), limit=1, sequence_length=32))
    assert 0 < max(facts["layer_errors"].values()) < 0.5  # another tensor would give more than 1
    assert facts["compared_with_report"]
    model = llmq.load(packed, "cpu", torch.float32)
    assert type(model).__name__ == type(original).__name__
    wanted = logits(model, IDS)
    ids = llmq.fast_generate(model, IDS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False).sequences
    assert torch.equal(ids, model.generate(IDS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False))
    copy = convert(ConvertConfig(packed, tmp_path / "gptq", "gptq"))
    assert torch.equal(logits(llmq.load(copy, "cpu", torch.float32), IDS), wanted)
    assert json.loads((copy / "preprocessor_config.json").read_text()) == PICTURES
    back = convert(ConvertConfig(copy, tmp_path / "back", "compressed-tensors"))
    assert (back / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
