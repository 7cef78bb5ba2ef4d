"""MLX packs embeddings and routers, too: they are read as dense tensors."""

import json

import pytest
import torch
from architectures.tiny_models import save_tiny as save_mixture
from hf_checkpoints import change_config
from packed import logits, pack, put_dequantized, random_weight, rewrite, some_tokens, with_real_zeros
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.mlx_files import MlxFiles
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.formats import mlx
from llmq.formats.scheme import Scheme
from llmq.run.convert import ConvertConfig, convert

TABLE, ROUTER = "model.embed_tokens", "model.layers.1.mlp.gate"
BITS = 6


def with_packed(source, output, name):
    """A checkpoint in which another weight is packed, with other bits than the linears; and that weight."""
    directory = pack(source, output, format="mlx")
    rows, columns = Checkpoint(directory).files.shape(f"{name}.weight")
    weight = with_real_zeros(random_weight(rows, columns, columns // 32, BITS, dtype=torch.bfloat16))
    rewrite(directory, lambda tensors: tensors.update(mlx.encode(name, weight, Scheme(BITS, 32, False))))
    own = {name: {"bits": BITS, "group_size": 32, "mode": "affine"}}
    change_config(directory, lambda config: config["quantization"].update(own))
    return directory, weight


def dense_twin(source, directory, name, weight):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.get_submodule(name).weight.data.copy_(weight.dequantize())
    return put_dequantized(model, directory)


@pytest.mark.parametrize("kind", ["qwen2", "llama-gqa"])  # tied to lm_head, and not
def test_a_model_with_packed_embeddings_computes_what_its_file_says(tmp_path, kind):
    source = save_tiny(tmp_path / "source", kind)
    directory, table = with_packed(source, tmp_path / "packed", TABLE)
    expected = logits(dense_twin(source, directory, TABLE, table), some_tokens())
    assert torch.equal(logits(llmq.load(directory, "cpu"), some_tokens()), expected)


def test_a_packed_router_is_read_as_a_dense_one(tmp_path):
    save_mixture("qwen3_moe", tmp_path / "source")
    directory, router = with_packed(tmp_path / "source", tmp_path / "packed", ROUTER)
    model = llmq.load(directory, "cpu")
    assert torch.equal(model.get_submodule(ROUTER).weight, router.dequantize())


def test_weights_of_experts_that_are_not_packed_stay_together(tmp_path):
    """JetMoE has such stacks in its attention, under a name that packed stacks have in other models."""
    save_mixture("jetmoe", tmp_path / "source")
    directory = pack(tmp_path / "source", tmp_path / "packed", format="mlx")
    assert "model.layers.0.self_attention.experts.input_linear.weight" in Checkpoint(directory).other_names
    llmq.load(directory, "cpu")


def test_large_tables_are_unpacked_in_pieces(tmp_path, llama, monkeypatch):
    directory, table = with_packed(llama, tmp_path / "packed", TABLE)
    monkeypatch.setattr("llmq.checkpoint.mlx_files._ROWS", 7)
    assert torch.equal(Checkpoint(directory).read(f"{TABLE}.weight"), table.dequantize())


def test_other_formats_get_the_dense_embeddings(tmp_path, llama):
    directory, table = with_packed(llama, tmp_path / "packed", TABLE)
    output = convert(ConvertConfig(directory, tmp_path / "gptq", "gptq"))
    assert torch.equal(Checkpoint(output).read(f"{TABLE}.weight"), table.dequantize())


def test_facts_are_those_of_the_dense_tensor_and_bytes_those_on_disk(tmp_path, llama):
    directory, table = with_packed(llama, tmp_path / "packed", TABLE)
    files = MlxFiles(directory, json.loads((directory / "config.json").read_text())["quantization"])
    name = f"{TABLE}.weight"
    assert [stored for stored in files.names() if stored.startswith(TABLE)] == [name]
    assert (files.shape(name), files.dtype(name), files.is_float(name)) == (table.q.shape, torch.float32, True)
    assert files.nbytes(name) == sum(part.nbytes for part in mlx.encode("", table, Scheme(BITS, 32, False)).values())


DAMAGED = {
    "without biases": (lambda t: t.pop(f"{TABLE}.biases"), "embed_tokens.biases is missing"),
    "with fewer scales": (
        lambda t: t.update({f"{TABLE}.scales": t[f"{TABLE}.scales"][:-1].clone()}),
        "packed tensors have different numbers of rows",
    ),
    "with float words": (
        lambda t: t.update({f"{TABLE}.weight": t[f"{TABLE}.weight"].int().float()}),
        "expected uint32 rows of 6-bit codes",
    ),
    "with one scale for all": (lambda t: t.update({f"{TABLE}.scales": torch.ones(())}), "different numbers of rows"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_embeddings_are_refused(tmp_path, llama, damage):
    directory, _ = with_packed(llama, tmp_path / "packed", TABLE)
    change, fault = DAMAGED[damage]
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=fault):
        llmq.load(directory, "cpu")
