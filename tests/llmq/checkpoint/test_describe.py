"""The description of a checkpoint against the weights it decodes to."""

import pytest
from packed import pack
from safetensors.torch import load_file

from llmq.checkpoint.describe import describe
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_each_layer_is_described_as_it_decodes_and_every_byte_is_counted(llama, tmp_path, form):
    directory = pack(llama, tmp_path / "packed", format=form, symmetric=False)
    checkpoint, said = Checkpoint(directory), describe(directory)
    assert [layer["name"] for layer in said["layers"]] == checkpoint.linears
    for layer in said["layers"]:
        weight = checkpoint.weight(layer["name"])
        assert (layer["out"], layer["in"]) == tuple(weight.q.shape)
        assert (layer["bits"], layer["group_size"], layer["symmetric"]) == (4, 32, False)
        zeros = weight.zero.float()
        assert layer["zero"] == {"min": int(zeros.min()), "mean": float(zeros.mean()), "max": int(zeros.max())}
    assert said["packed_weights"] == sum(layer["out"] * layer["in"] for layer in said["layers"])
    assert said["bits_per_packed_weight"] == 8 * said["packed_bytes"] / said["packed_weights"]
    stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    assert said["packed_bytes"] + said["other_bytes"] == stored


def test_zero_points_in_the_middle_are_symmetric_whatever_the_format_says_of_them(llama, tmp_path):
    said = describe(pack(llama, tmp_path / "packed", format="mlx", layer_bits=("down_proj=2",)))
    assert (said["quant_method"], said["format"], said["bits"], said["symmetric"]) == ("mlx", "mlx", [2, 4], True)


def test_one_group_per_row_is_as_long_as_the_row(llama, tmp_path):
    said = describe(pack(llama, tmp_path / "packed", group_size=-1))
    assert all(layer["group_size"] == layer["in"] for layer in said["layers"])


def test_an_original_model_is_refused(llama):
    with pytest.raises(CheckpointError, match="is not a quantized checkpoint"):
        describe(llama)
