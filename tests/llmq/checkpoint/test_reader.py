"""Checkpoint: what is packed and what is not, read from disk one linear at a time."""

import json

import pytest
import torch
from packed import pack
from safetensors import safe_open
from safetensors.torch import load_file

from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.errors import CheckpointError
from llmq.models import safetensors_files
from llmq.models.safetensors_files import SafetensorsDirectory


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    return pack(llama, tmp_path_factory.mktemp("packed") / "gptq", format="gptq")


def test_every_linear_of_the_blocks_is_packed_and_nothing_else(packed, llama):
    checkpoint = Checkpoint(packed)
    originals = SafetensorsDirectory(llama).names()
    linears = {n.removesuffix(".weight") for n in originals if n.endswith("_proj.weight")}
    assert set(checkpoint.linears) == linears
    assert set(checkpoint.schemes) == linears
    assert set(checkpoint.other_names) == originals - {f"{n}.weight" for n in linears}


def test_packed_and_other_names_are_the_files_tensors(packed):
    checkpoint = Checkpoint(packed)
    stored = {name for file in packed.glob("*.safetensors") for name in load_file(file)}
    assert checkpoint.packed_names | set(checkpoint.other_names) == stored
    assert not checkpoint.packed_names & set(checkpoint.other_names)


def test_tensors_given_instead_are_taken(packed):
    checkpoint = Checkpoint(packed)
    first, second, *_ = (n for n in checkpoint.linears if n.endswith("up_proj"))
    parts = checkpoint.format.TENSOR_SUFFIXES
    instead = {f"{first}.{p}": checkpoint.files.read(f"{second}.{p}") for p in parts}
    assert torch.equal(checkpoint.weight(first, instead).q, checkpoint.weight(second).q)
    assert not torch.equal(checkpoint.weight(first).q, checkpoint.weight(second).q)


def test_a_linear_opens_each_of_its_shards_once(packed, monkeypatch):
    checkpoint, opened = Checkpoint(packed), []
    monkeypatch.setattr(safetensors_files, "_open", lambda path: opened.append(path) or safe_open(path, framework="pt"))
    checkpoint.weight(checkpoint.linears[0])
    assert len(opened) == len(set(opened)) > 0


def test_is_packed_tells_packed_from_plain_and_from_nothing(packed, llama, tmp_path):
    assert is_packed(packed)
    assert not is_packed(llama)
    assert not is_packed(tmp_path / "missing")


def test_settings_of_mlx_are_found_where_its_tools_write_them(llama, tmp_path):
    directory = pack(llama, tmp_path / "mlx", format="mlx")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]  # as mlx_lm did once
    (directory / "config.json").write_text(json.dumps(config))
    assert is_packed(directory)
    assert Checkpoint(directory).quantization == {"bits": 4, "group_size": 32, "mode": "affine"}


def test_a_plain_model_is_no_checkpoint(llama):
    with pytest.raises(CheckpointError, match="is not a quantized checkpoint"):
        Checkpoint(llama)


def test_a_config_that_promises_packed_layers_to_a_plain_model_is_refused(llama, packed, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((packed / "config.json").read_text())))
    with pytest.raises(CheckpointError, match="holds no layer packed as gptq, although it says so"):
        Checkpoint(tmp_path)
