"""A checkpoint with a single wrong tensor would still talk, only worse: llmq.load refuses it instead."""

import json
import shutil

import pytest
import torch
from packed import pack, rewrite
from tiny import save_tiny

import llmq
from llmq.core.errors import CheckpointError
from llmq.run.convert import ConvertConfig, convert

LINEAR = "model.layers.1.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A packed Qwen2 (it has biases) that loads."""
    root = tmp_path_factory.mktemp("sound")
    directory = pack(save_tiny(root / "source", "qwen2"), root / "packed")
    llmq.load(directory, "cpu")
    return directory


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "packed")


def refused(directory, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        llmq.load(directory, "cpu")
    assert len(str(caught.value).splitlines()) <= 2


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


MISSING = [
    NORM,
    "model.norm.weight",
    "model.embed_tokens.weight",
    f"{LINEAR}.bias",
    f"{LINEAR}.weight_scale",
    f"{LINEAR}.weight_shape",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(checkpoint, name):
    rewrite(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, name)


def test_a_linear_without_codes_is_missed_as_a_weight(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop(f"{LINEAR}.weight_packed"))
    refused(checkpoint, f"lacks {LINEAR}.weight;")


LEFT_OVER = {
    "a tensor of nobody": "model.layers.0.surprise",
    "a block too many": "model.layers.3.input_layernorm.weight",
    "a dense copy": f"{LINEAR}.weight",
    "a bias of a linear without one": "model.layers.0.mlp.up_proj.bias",
    "act-order indices": f"{LINEAR}.weight_g_idx",
    "zero points of a symmetric weight": f"{LINEAR}.weight_zero_point",
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_a_tensor_that_would_be_ignored_is_refused(checkpoint, case):
    rewrite(checkpoint, lambda tensors: tensors.update({LEFT_OVER[case]: torch.ones(64)}))
    refused(checkpoint, "unknown tensor|zero points")


DAMAGE = {
    "norm too long": (NORM, lambda t: torch.ones(65)),
    "embedding transposed": ("model.embed_tokens.weight", lambda t: t.T.contiguous()),
    "bias too short": (f"{LINEAR}.bias", lambda t: t[:-1].clone()),
    "bias of one number": (f"{LINEAR}.bias", lambda t: t[:1].clone()),
    "bias of integers": (f"{LINEAR}.bias", lambda t: t.int()),
    "codes cut": (f"{LINEAR}.weight_packed", lambda t: t[:, :-1].contiguous()),
    "codes as floats": (f"{LINEAR}.weight_packed", lambda t: t.float()),
    "half of the scales": (f"{LINEAR}.weight_scale", lambda t: t[:, ::2].contiguous()),
    "NaN scale": (f"{LINEAR}.weight_scale", lambda t: t * float("nan")),
    "shape of nothing": (f"{LINEAR}.weight_shape", lambda t: t * 0),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_tensor_that_does_not_fit_is_refused(checkpoint, case):
    name, change = DAMAGE[case]
    rewrite(checkpoint, lambda tensors: tensors.update({name: change(tensors[name])}))
    refused(checkpoint, name if case != "NaN scale" else f"{LINEAR}: a scale is not finite")


def test_a_linear_of_another_model_is_refused(checkpoint):
    change_config(checkpoint, lambda config: config.update(intermediate_size=128))
    refused(checkpoint, r"packed as \(96, 64\)|packed as \(64, 96\)")


def test_a_packed_linear_that_the_model_has_not_is_refused(checkpoint):
    change_config(checkpoint, lambda config: config.update(num_hidden_layers=1, layer_types=["full_attention"]))
    refused(checkpoint, "model.layers.1.mlp.down_proj is packed, but the model has no such linear")


def test_a_packed_head_of_a_tied_model_is_refused_though_its_words_are_called_weight(sound, tmp_path):
    directory = convert(ConvertConfig(sound, tmp_path / "mlx", "mlx"))

    def add_head(tensors):
        linear = "model.layers.0.self_attn.o_proj"
        tensors |= {n.replace(linear, "lm_head"): t.clone() for n, t in tensors.items() if n.startswith(linear)}

    rewrite(directory, add_head)
    refused(directory, "lm_head is packed, but the model ties it to its embeddings")


@pytest.mark.parametrize("method", ["gguf", "", None, 4])
def test_an_unknown_quantization_method_is_refused(checkpoint, method):
    change_config(checkpoint, lambda config: config["quantization_config"].update(quant_method=method))
    refused(checkpoint, "is not one of compressed-tensors, gptq, awq, mlx, auto-round")


@pytest.mark.parametrize("value", [None, {}, [], "compressed-tensors"], ids=str)
def test_a_directory_without_quantization_is_refused(checkpoint, value):
    change_config(checkpoint, lambda config: config.update(quantization_config=value))
    refused(
        checkpoint,
        "is not a quantized checkpoint: its config.json has no quantization_config|method 'None' is not one of",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"], ids=repr)
def test_a_config_that_is_no_json_object_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, "config.json")


def test_an_unfinished_directory_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json is missing")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(checkpoint, kept):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(checkpoint, "corrupt or truncated")


def test_a_file_of_noise_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    refused(checkpoint, "corrupt or truncated")


def test_an_index_that_was_left_over_beside_the_only_file_is_not_looked_at(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "model-1.safetensors"}}))
    llmq.load(checkpoint, "cpu")


def test_a_missing_shard_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(checkpoint, "model-00001-of-00002.safetensors is missing")
