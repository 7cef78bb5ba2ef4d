"""We read AutoRound's checkpoints in all of its formats, with the same weights as its own loaders (`make interop`)."""

import pytest
import torch
from agreement import assert_same_weights
from packed import pack
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from llmq.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Save a tiny model with biases and tied embeddings."""
    return save_tiny(tmp_path_factory.mktemp("source") / "model", "qwen2", torch.float16)


def rounded(source, directory, form, bits, symmetric, **settings):
    """Quantize with AutoRound, without its training. Returns the directory of the checkpoint."""
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    options = {"bits": bits, "sym": symmetric, "group_size": 32, "iters": 0, "disable_opt_rtn": True} | settings
    tool = AutoRound(model, AutoTokenizer.from_pretrained(source), device_map="cpu", **options)
    tool.quantize_and_save(str(directory), format=form)
    (config,) = directory.rglob("config.json")
    return config.parent


def opened(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float16, **options)


@pytest.mark.parametrize(
    ("form", "bits", "symmetric", "stored"),
    [
        ("auto_round", 4, True, "gptq"),
        ("auto_round", 4, False, "awq"),
        ("auto_round", 2, True, "gptq"),
        ("auto_round", 3, True, "gptq"),
        ("auto_round", 8, True, "gptq"),
        ("auto_round:auto_gptq", 4, True, "gptq"),
        ("auto_round:gptqmodel", 4, False, "gptq"),
        ("auto_round:auto_awq", 4, False, "awq"),
    ],
)
def test_we_read_its_own_formats(source, tmp_path, form, bits, symmetric, stored):
    directory = rounded(source, tmp_path / "theirs", form, bits, symmetric)
    checkpoint = Checkpoint(directory)
    assert checkpoint.quantization["quant_method"] == "auto-round"
    assert stored == checkpoint.format.METHOD
    (scheme,) = assert_same_weights(opened(directory), directory)
    assert (scheme.bits, scheme.symmetric) == (bits, symmetric)


def test_we_read_its_bits_per_layer(source, tmp_path):
    others = {"layer_config": {"down_proj": {"bits": 8}, "model.layers.0.self_attn.o_proj": {"bits": 2}}}
    directory = rounded(source, tmp_path / "theirs", "auto_round", 4, True, **others)
    assert {scheme.bits for scheme in assert_same_weights(opened(directory), directory)} == {2, 4, 8}


@pytest.mark.parametrize(("form", "method"), [("auto_gptq", "gptq"), ("auto_awq", "awq")])
def test_we_read_the_formats_of_others_that_it_writes(source, tmp_path, form, method):
    directory = rounded(source, tmp_path / "theirs", form, 4, True)
    assert Checkpoint(directory).quantization["quant_method"] == method
    assert_same_weights(opened(directory), directory)


def test_we_read_the_compressed_tensors_that_it_writes(source, tmp_path):
    directory = rounded(source, tmp_path / "theirs", "llm_compressor", 4, True)
    assert Checkpoint(directory).quantization["quant_method"] == "compressed-tensors"
    model = opened(directory, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_same_weights(model, directory)


@pytest.mark.parametrize("symmetric", [True, False])
def test_its_loader_reads_our_awq_checkpoints(source, tmp_path, symmetric):
    from transformers import AutoRoundConfig

    directory = pack(source, tmp_path / "awq", format="awq", symmetric=symmetric)
    assert_same_weights(opened(directory, quantization_config=AutoRoundConfig()), directory)
