"""MLX packs embeddings and routers, too: they are read as dense tensors."""

import json

import pytest
import torch
from architectures.tiny_models import save_tiny as save_mixture
from hf_checkpoints import BITS, TABLE, opened, with_packed_weight
from packed import logits, pack, put_dequantized, random_weight, rewrite, some_tokens
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.mlx_files import MlxFiles
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.formats import mlx
from llmq.formats.scheme import Scheme
from llmq.run.convert import ConvertConfig, convert

ROUTER = "model.layers.1.mlp.gate"


def dense_twin(source, directory, name, weight):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.get_submodule(name).weight.data.copy_(weight.dequantize(torch.float64))
    return put_dequantized(model, directory)


@pytest.mark.parametrize("kind", ["qwen2", "llama-gqa"])  # tied to lm_head, and not
def test_a_model_with_packed_embeddings_computes_what_its_file_says(tmp_path, kind):
    source = save_tiny(tmp_path / "source", kind)
    directory, table = with_packed_weight(source, tmp_path / "packed", TABLE)
    expected = logits(dense_twin(source, directory, TABLE, table), some_tokens())
    assert torch.equal(logits(llmq.load(directory, "cpu"), some_tokens()), expected)


def test_a_packed_router_is_read_as_a_dense_one(tmp_path):
    save_mixture("qwen3_moe", tmp_path / "source")
    directory, router = with_packed_weight(tmp_path / "source", tmp_path / "packed", ROUTER)
    model = llmq.load(directory, "cpu")
    assert torch.equal(model.get_submodule(ROUTER).weight, router.dequantize(torch.float64).float())


def test_weights_of_experts_that_are_not_packed_stay_together(tmp_path):
    """JetMoE has such stacks in its attention, under a name that packed stacks have in other models."""
    save_mixture("jetmoe", tmp_path / "source")
    directory = pack(tmp_path / "source", tmp_path / "packed", format="mlx")
    assert "model.layers.0.self_attention.experts.input_linear.weight" in Checkpoint(directory).other_names
    llmq.load(directory, "cpu")


def test_large_tables_are_unpacked_in_pieces(tmp_path, llama, monkeypatch):
    directory, table = with_packed_weight(llama, tmp_path / "packed", TABLE)
    monkeypatch.setattr("llmq.checkpoint.mlx_files._ROWS", 7)
    assert torch.equal(Checkpoint(directory).read(f"{TABLE}.weight"), table.dequantize(torch.float64).float())


def test_other_formats_get_the_dense_embeddings(tmp_path, llama):
    directory, table = with_packed_weight(llama, tmp_path / "packed", TABLE)
    output = convert(ConvertConfig(directory, tmp_path / "gptq", "gptq"))
    assert torch.equal(Checkpoint(output).read(f"{TABLE}.weight"), table.dequantize(torch.float64).float())


def test_facts_are_those_of_the_dense_tensor_and_bytes_those_on_disk(tmp_path, llama):
    directory, table = with_packed_weight(llama, tmp_path / "packed", TABLE)
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
    directory, _ = with_packed_weight(llama, tmp_path / "packed", TABLE)
    change, fault = DAMAGED[damage]
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=fault):
        llmq.load(directory, "cpu")


def test_stock_transformers_is_told_to_leave_such_a_model_to_llmq(tmp_path, llama):
    directory, _ = with_packed_weight(llama, tmp_path / "packed", TABLE)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens is packed and is no linear.*use llmq\.load"):
        opened(directory)


@pytest.mark.parametrize(("rows", "is_dense"), [(32, True), (64, False)])
def test_a_gate_as_large_as_its_inputs_is_a_linear(tmp_path, llama, rows, is_dense):
    """llmq packs it, like any linear."""
    directory = pack(llama, tmp_path / "packed", format="mlx")
    gate = mlx.encode("model.layers.0.gate", random_weight(rows, 64, 2), Scheme(4, 32, True))
    rewrite(directory, lambda tensors: tensors.update(gate))
    assert ("model.layers.0.gate" not in Checkpoint(directory).linears) == is_dense
