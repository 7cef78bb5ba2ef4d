"""GGUF files: their rotary frequencies are kept, and no tensor gets a dtype that it does not fit into."""

from __future__ import annotations

import json
import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from packed import logits, pack, some_tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.models.gguf_file import GgufFile
from llmq.models.model_source import ModelSource

WIDTH, THETA = 16, 500_000.0  # of a head; half as many frequencies
CONTEXT = 131_072


def as_bfloat16(values):
    """The upper half of each float32 number, which GGUF stores as bytes."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def write_gguf(path, extra: dict[str, list[float]], dtype: Any = np.float16, architecture="llama", experts=0):
    """A model of one block, with these further vectors. The matrices are of `dtype`, or in bfloat16 if it is None.

    `experts`: how many there are in each tensor; the header says four.
    """
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_key_length(WIDTH)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    drawn = np.random.default_rng(0)

    def put(name, *shape):
        values = drawn.standard_normal(shape) * 0.1
        if dtype is None:
            writer.add_tensor(name, as_bfloat16(values), raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values.astype(dtype))

    put("token_embd.weight", 64, 64)
    put("output.weight", 64, 64)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.full(64, 1.0, np.float32))
    for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
        put(f"blk.0.{name}.weight", rows, 64)
    if experts:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        for norm in ("attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"blk.0.{norm}.weight", np.full(WIDTH, 1.0, np.float32))
        put("blk.0.ffn_gate_inp.weight", 4, 64)
    # transformers reads no size of experts, and takes 768
    stack, inner, suffix = ((experts,), 768, "_exps") if experts else ((), 96, "")
    put(f"blk.0.ffn_gate{suffix}.weight", *stack, inner, 64)
    put(f"blk.0.ffn_up{suffix}.weight", *stack, inner, 64)
    put(f"blk.0.ffn_down{suffix}.weight", *stack, 64, inner)
    for name, values in extra.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch):
    """The files above have none, and none is needed to round weights."""
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *_, **__: ())
    monkeypatch.setattr(ModelSource, "tokenizer", PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast))


def test_the_source_reads_the_weights_that_transformers_own_loader_reads(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = ModelSource(str(path)).load_all(torch.device("cpu"), torch.float32)
    ids = some_tokens() % 64
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


def test_a_file_is_parsed_once_for_the_config_the_tokenizer_and_the_weights(tmp_path, monkeypatch):
    path, parsed, parse = write_gguf(tmp_path / "m.gguf", {}), [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, name: parsed.append(name) or parse(self, name))
    monkeypatch.setattr(ModelSource, "tokenizer", property(lambda self: gguf.GGUFReader(str(path))))
    reader = gguf.GGUFReader
    ModelSource(str(path))
    assert parsed == [str(path)]
    assert gguf.GGUFReader is reader


def frequencies(directory):
    return llmq.load(directory, "cpu").model.rotary_emb.inv_freq


def test_frequencies_are_divided_by_what_the_file_says(tmp_path):
    divisors = [1.0, 1.0, 1.0, 1.5, 2.0, 8.0, 8.0, 8.0]
    output = pack(write_gguf(tmp_path / "m.gguf", {"rope_freqs.weight": divisors}), tmp_path / "out")
    expected = THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH) / torch.tensor(divisors)
    torch.testing.assert_close(frequencies(output), expected)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_those_of_llama_3_1_have_the_name_that_engines_know(factor, tmp_path):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"rope_theta": THETA, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=CONTEXT, rope_parameters=scaling
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = (THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH) / wanted).tolist()
    output = pack(write_gguf(tmp_path / "m.gguf", {"rope_freqs.weight": divisors}), tmp_path / "out")
    stored = json.loads((output / "config.json").read_text())["rope_parameters"]
    assert (stored["rope_type"], stored["factor"]) == ("llama3", factor)
    torch.testing.assert_close(frequencies(output), wanted)


def test_short_and_long_texts_may_have_divisors_of_their_own(tmp_path):
    extra = {"rope_factors_short.weight": [1.0] * 8, "rope_factors_long.weight": [float(i) for i in range(1, 9)]}
    output = pack(write_gguf(tmp_path / "m.gguf", extra), tmp_path / "out")
    stored = json.loads((output / "config.json").read_text())["rope_parameters"]
    assert stored["rope_type"] == "longrope"
    assert (stored["short_factor"], stored["long_factor"]) == tuple(extra.values())


@pytest.mark.parametrize("extra", [{}, {"rope_freqs.weight": [1.0, 1.0, 1.0, 1.5, 2.0, 8.0, 8.0, 8.0]}])
def test_readers_of_older_configs_find_the_same_rotary_settings(extra, tmp_path):
    stored = json.loads((pack(write_gguf(tmp_path / "m.gguf", extra), tmp_path / "out") / "config.json").read_text())
    assert stored["rope_theta"] == THETA
    assert ("rope_scaling" in stored) == bool(extra)
    newer = LlamaConfig(**stored).rope_parameters
    assert newer == stored.pop("rope_parameters") == LlamaConfig(**stored).rope_parameters


def test_without_such_tensors_the_frequencies_are_the_usual_ones(tmp_path):
    output = pack(write_gguf(tmp_path / "m.gguf", {}), tmp_path / "out")
    torch.testing.assert_close(frequencies(output), THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH))


@pytest.mark.parametrize(
    ("stored", "kept"),
    [(np.float16, torch.float16), (None, torch.bfloat16), (np.float32, torch.float32)],
    ids=["float16", "bfloat16", "float32"],
)
def test_matrices_keep_their_dtype(stored, kept, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, stored)
    source = ModelSource(str(path))
    assert source.dtype == kept
    assert source.read("model.embed_tokens.weight").dtype == kept
    tensors = load_file(pack(path, tmp_path / "out") / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == kept
    assert math.isclose(float(tensors["model.norm.weight"].float().mean()), 1.0)


def test_a_large_number_of_a_bfloat16_file_stays_finite(tmp_path, monkeypatch):
    source = ModelSource(str(write_gguf(tmp_path / "m.gguf", {}, None)))
    monkeypatch.setattr("gguf.dequantize", lambda *_: np.full((64, 64), 1e30, np.float32))
    assert isinstance(source.files.stored, GgufFile)
    assert bool(torch.isfinite(source.files.read("model.embed_tokens.weight")).all())


def test_experts_are_read_one_by_one_from_the_tensors_that_hold_them_all(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, architecture="qwen3moe", experts=4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    source = ModelSource(str(path))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert torch.equal(
        source.read(name).float(), theirs.state_dict()["model.layers.0.mlp.experts.gate_up_proj"][2, 768:]
    )
    assert source.files.nbytes(name) == 2 * 768 * 64
    ours, ids = source.load_all(torch.device("cpu"), torch.float32), torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    packed = Checkpoint(pack(path, tmp_path / "out"))  # as compressed-tensors, which transformers opens
    assert name.removesuffix(".weight") in packed.linears


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts_is_refused(experts, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, architecture="qwen3moe", experts=experts)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down_exps\.weight does not hold the matrices of 4 experts"):
        ModelSource(str(path)).load_all(torch.device("cpu"), torch.float32)
