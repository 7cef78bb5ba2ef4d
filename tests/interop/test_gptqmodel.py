"""GPTQModel opens our checkpoints, and we open its: with the same weights to the last bit (`make interop`)."""

import pytest
import torch
from agreement import assert_same_weights
from packed import dequantized_model, logits, pack, some_tokens
from tiny import save_tiny

from llmq.core.settings import GPTQ_BITS
from llmq.formats.scheme import Scheme
from llmq.run.convert import ConvertConfig, convert

pytestmark = pytest.mark.peers

IDS = some_tokens()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Save a tiny model with biases and tied embeddings, in float16, which all kernels of GPTQModel support."""
    return save_tiny(tmp_path_factory.mktemp("source") / "model", "qwen2", torch.float16)


def opened(directory):
    """Open the checkpoint with GPTQModel, with its kernels that run on any CPU."""
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if "awq" in directory.name else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(directory), backend=backend, device="cpu", dtype=torch.float16).model


def quantized_by_gptqmodel(source, directory, **settings):
    """Quantize with GPTQModel. Returns the directory of the checkpoint."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(
        str(source), QuantizeConfig(group_size=32, offload_to_disk=False, **settings), device="cpu", dtype=torch.float16
    )
    texts = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in some_tokens(8)]
    model.quantize(texts, batch_size=1, calibration_concat_size=0)
    model.save(str(directory))
    return directory


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_it_reads_our_gptq_checkpoints(source, tmp_path, bits, symmetric):
    directory = pack(source, tmp_path / "gptq", format="gptq", bits=bits, symmetric=symmetric)
    model = opened(directory)
    expected = logits(dequantized_model(source, directory, torch.float16).half(), IDS)
    # Both compute in float16, but sum in different orders.
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=4e-3)
    assert_same_weights(model, directory)


def test_it_refuses_asymmetric_v1_files_of_others(source, tmp_path):
    """So llmq writes asymmetric weights as v2, even where no zero point is 0."""
    directory = pack(source, tmp_path / "gptq", format="gptq", symmetric=False)
    for path in (directory / "config.json", directory / "quantize_config.json"):
        path.write_text(path.read_text().replace("gptq_v2", "gptq"))
    with pytest.raises(ValueError, match="Loading of a sym=False model"):
        opened(directory)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_it_reads_our_other_group_sizes(source, tmp_path, group_size):
    directory = pack(source, tmp_path / "gptq", format="gptq", group_size=group_size)
    assert {scheme.group_size for scheme in assert_same_weights(opened(directory), directory)} == {group_size}


def test_it_reads_our_bits_per_layer(source, tmp_path):
    layer_bits = ("down_proj=8", "layers.0.*=3", "o_proj=2")
    directory = pack(source, tmp_path / "gptq", format="gptq", layer_bits=layer_bits)
    assert {scheme.bits for scheme in assert_same_weights(opened(directory), directory)} == {2, 3, 4, 8}


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_reads_our_awq_checkpoints(source, tmp_path, symmetric):
    directory = pack(source, tmp_path / "awq", format="awq", symmetric=symmetric)
    assert_same_weights(opened(directory), directory)


def test_it_reads_our_gpt2(tmp_path):
    """Its Conv1D layers are packed as linears are."""
    source = save_tiny(tmp_path / "model", "gpt2", torch.float16)
    directory = pack(source, tmp_path / "gptq", format="auto")
    expected = logits(dequantized_model(source, directory, torch.float16).half(), IDS)
    torch.testing.assert_close(logits(opened(directory), IDS), expected, rtol=0, atol=4e-3)


THEIRS = {
    "v1": ({"bits": 4, "desc_act": False}, Scheme(4, 32, True, zero_offset=1)),
    "v1, act order": ({"bits": 4, "desc_act": True}, Scheme(4, 32, True, act_order=True, zero_offset=1)),
    "v1, 8 bit, asymmetric": ({"bits": 8, "sym": False, "desc_act": False}, Scheme(8, 32, False, zero_offset=1)),
    "v2": ({"bits": 4, "format": "gptq_v2", "desc_act": False}, Scheme(4, 32, True)),
    "v2, 3 bit, asymmetric, act order": (
        {"bits": 3, "sym": False, "format": "gptq_v2", "desc_act": True},
        Scheme(3, 32, False, act_order=True),
    ),
}


@pytest.mark.parametrize(("settings", "scheme"), THEIRS.values(), ids=THEIRS)
def test_we_read_its_checkpoints_and_it_reads_our_copies(source, tmp_path, settings, scheme):
    directory = quantized_by_gptqmodel(source, tmp_path / "theirs", **settings)
    assert assert_same_weights(opened(directory), directory) == {scheme}
    copy = convert(ConvertConfig(directory, tmp_path / "copy", "gptq"))
    assert_same_weights(opened(copy), copy)
    assert_same_weights(opened(copy), directory)


@pytest.mark.parametrize(("form", "bits", "symmetric"), [("gptq", 4, True), ("gptq", 3, False), ("awq", 4, True)])
def test_transformers_reads_our_checkpoints_with_its_kernels(source, tmp_path, form, bits, symmetric):
    """Check awq only for symmetric weights: the int4 CPU kernel that transformers picks rounds other zero points."""
    from transformers import AutoModelForCausalLM

    directory = pack(source, tmp_path / form, format=form, bits=bits, symmetric=symmetric)
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float16)
    assert "gptqmodel" in type(model.model.layers[0].mlp.up_proj).__module__
    assert_same_weights(model, directory)
