"""A block goes through the format before a run starts: what comes back must be what was given."""

import shutil

import pytest
import torch
from planned import open_run
from safetensors.torch import load_file, save_file

import llmq
from llmq import formats
from llmq.core.errors import CheckpointError, WorkError
from llmq.run.format_roundtrip import prove


def test_a_checkpoint_is_only_begun_if_its_format_gives_back_what_it_is_given(llama, text_file, tmp_path, monkeypatch):
    for stored_as, part in (
        ("compressed-tensors", "weight_packed"),
        ("gptq", "scales"),
        ("awq", "qzeros"),
        ("mlx", "biases"),
    ):
        module = formats.FORMATS[stored_as]
        encode = module.encode

        def lossy(name, weight, scheme, encode=encode, part=part):
            tensors = encode(name, weight, scheme)
            tensors[f"{name}.{part}"][0, 0] += 1
            return tensors

        with monkeypatch.context() as patch:
            patch.setattr(module, "encode", lossy)
            request, run = open_run(llama, text_file, tmp_path / "out", format=stored_as, symmetric=stored_as != "awq")
            with pytest.raises(WorkError, match=rf"layers.0.self_attn.q_proj does not survive .* format {stored_as}"):
                llmq.quantize(request.config)
        assert list(tmp_path.iterdir()) == []
        prove(run)


def test_a_weight_that_is_no_matrix_is_refused(llama, text_file, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(5)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    _, run = open_run(source, text_file, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \(5,\); the model .* wants \(64, 64\)"):
        prove(run)


def test_real_zero_points_that_happen_to_be_codes_come_back(llama, text_file, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    q_proj = tensors["model.layers.0.self_attn.q_proj.weight"]
    steps = torch.arange(q_proj.numel()).view_as(q_proj) % 16 - 8  # each group has all of them, so its zero point is 8
    tensors["model.layers.0.self_attn.q_proj.weight"] = (steps / 64).to(q_proj.dtype)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    _, run = open_run(source, text_file, tmp_path / "out", format="mlx", symmetric=False)
    prove(run)


def test_the_proof_sees_one_linear_of_each_shape_and_number_of_bits(llama, text_file, tmp_path, monkeypatch):
    seen = []
    module = formats.FORMATS["compressed-tensors"]
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda name, *rest: seen.append(name) or encode(name, *rest))
    _, run = open_run(llama, text_file, tmp_path / "out", layer_bits=("o_proj=8",), blocks="1")
    prove(run)
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert seen == [f"model.layers.1.{leaf}" for leaf in leaves]
