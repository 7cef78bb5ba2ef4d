"""config.json of strangers: a model comes of it only if the files beside it could fill one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed import pack
from tiny import save_tiny, tiny_model

from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.runtime import model_config as module
from llmq.runtime.model_config import failure, model_config


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    return pack(save_tiny(root / "source", "qwen2"), root / "packed")


@pytest.fixture
def changed(sound, tmp_path):
    """A function that returns the checkpoint with other entries in its config.json."""

    def change(**entries):
        directory = Path(shutil.copytree(sound, tmp_path / "packed"))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | entries))
        return Checkpoint(directory)

    return change


def test_a_sound_config_is_given_without_its_quantization(sound):
    config = model_config(Checkpoint(sound))
    assert not hasattr(config, "quantization_config")
    assert (config.model_type, config.hidden_size, config.output_attentions) == ("qwen2", 64, False)


@pytest.mark.parametrize("model_type", ["no_such_model", None])
def test_a_model_that_transformers_does_not_know_is_refused(changed, model_type):
    with pytest.raises(CheckpointError, match="describes no model"):
        model_config(changed(model_type=model_type))


REFUSED = {
    "other files": ({"configuration_files": ["config.4.0.0.json"]}, "it names other configuration files"),
    "no blocks": ({"num_hidden_layers": 0, "layer_types": []}, r"it has 0 blocks, but the files hold \d+ tensors"),
    "more blocks than tensors": (
        {"num_hidden_layers": 900, "layer_types": ["full_attention"] * 900},
        r"it has 900 blocks, but the files hold \d+ tensors",
    ),
    "blocks without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is more than 1000000"),
    "labels without end": ({"num_labels": 10**9}, "num_labels is more than 10000"),
    "an infinite count": ({"num_hidden_layers": float("inf")}, "num_hidden_layers is more than 1000000"),
    "a nested count": ({"extra": [{"text": {"depth": 10**12}}]}, "depth is more than 1000000"),
    "a huge vocabulary": ({"vocab_size": 10**9}, r"it describes a tensor of \d+ weights, more than all files could"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_the_files_cannot_fill_is_refused_before_it_is_built(changed, case):
    entries, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason):
        model_config(changed(**entries))


def test_more_modules_than_the_tensors_need_are_refused(sound, monkeypatch):
    monkeypatch.setattr(module, "_MODULES_PER_TENSOR", -1000)
    with pytest.raises(CheckpointError, match=r"describes more than -?\d+ modules, but the files hold \d+ tensors"):
        model_config(Checkpoint(sound))


def test_buffers_that_no_file_explains_are_refused(sound, monkeypatch):
    monkeypatch.setattr(module, "_SPARE", -(10**12))
    with pytest.raises(CheckpointError, match=r"describes \d+ bytes of buffers; all files have \d+"):
        model_config(Checkpoint(sound))


def test_a_model_that_does_not_run_tells_why():
    model = tiny_model("llama-gqa")
    assert failure(model, torch.device("cpu")) is None
    del model.model.layers[1].self_attn.k_proj
    assert "k_proj" in failure(model, torch.device("cpu"))
