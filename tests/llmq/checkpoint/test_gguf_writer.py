"""What a .gguf file holds beside the blocks: other tensors in the dtype that was asked for, and what describes them."""

from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from gguf_models import TEMPLATE, file_in, known_words, save_model
from packed import logits, pack, some_tokens
from safetensors.torch import load_file

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import VERSION
from llmq.models.gguf_header import read_header
from llmq.run.convert import ConvertConfig, convert


@pytest.fixture(scope="module", autouse=True)
def _known_words():
    with known_words():
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bfloat16 Qwen2 (biases, tied embeddings), of which only the first block is packed, as compressed-tensors."""
    root = tmp_path_factory.mktemp("packed")
    return pack(save_model(root / "model", "qwen2", torch.bfloat16), root / "twin", blocks="0")


def written(packed, tmp_path, **options):
    return convert(ConvertConfig(packed, tmp_path / "out", "gguf", **options))


def stored(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


OF_BLOCK_0 = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@pytest.mark.parametrize(
    ("floats", "kind"), [("auto", "BF16"), ("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")]
)
def test_other_tensors_have_the_type_that_was_asked_for(floats, kind, packed, tmp_path):
    path = written(packed, tmp_path, gguf_floats=floats)
    found = stored(path)
    assert Counter(tensor.tensor_type.name for tensor in found.values() if len(tensor.shape) == 1).keys() == {"F32"}
    matrices = {name: tensor.tensor_type.name for name, tensor in found.items() if len(tensor.shape) > 1}
    assert {name for name, its in matrices.items() if its == "Q4_0"} == {f"blk.0.{name}.weight" for name in OF_BLOCK_0}
    others = {its for name, its in matrices.items() if not name.startswith("blk.0.")}
    assert others == {kind}
    ours = Checkpoint(path)
    assert all(torch.equal(ours.weight(n).q, Checkpoint(packed).weight(n).q) for n in Checkpoint(packed).linears)
    difference = logits(llmq.load(path, "cpu"), some_tokens()) - logits(llmq.load(packed, "cpu"), some_tokens())
    assert float(difference.abs().max()) <= (0 if floats in ("auto", "f32", "bf16") else 0.1)


def test_biases_and_norms_are_those_of_the_checkpoint(packed, tmp_path):
    found, tensors = stored(written(packed, tmp_path)), load_file(packed / "model.safetensors")
    for name, theirs in {
        "model.layers.0.self_attn.v_proj.bias": "blk.0.attn_v.bias",
        "model.layers.1.self_attn.q_proj.bias": "blk.1.attn_q.bias",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        assert np.array_equal(found[theirs].data, tensors[name].float().numpy()), name
    assert "output.weight" not in found  # embeddings are used instead


def test_the_file_says_what_it_is(packed, tmp_path):
    path = written(packed, tmp_path)
    said = read_header(path).metadata
    assert path.name == "model-Q4_0.gguf"
    assert {key: said[key] for key in ("general.architecture", "general.name", "general.quantized_by")} == {
        "general.architecture": "qwen2",
        "general.name": "model",
        "general.quantized_by": f"llmq {VERSION}",
    }
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert (said["qwen2.block_count"], said["qwen2.embedding_length"], said["qwen2.attention.head_count_kv"]) == (
        2,
        64,
        2,
    )
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert said["llmq.scale_dtype"] == "bfloat16"


def test_scales_in_float16_need_no_mention(tmp_path):
    path = file_in(pack(save_model(tmp_path / "model"), tmp_path / "out", format="gguf", group_size=128, bits=8))
    said = read_header(path).metadata
    assert "llmq.scale_dtype" not in said
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
