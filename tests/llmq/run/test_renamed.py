"""Models with other names of tensors in the files than in memory go the whole way: quantize, verify, convert, save."""

import json
from dataclasses import replace

import pytest
import torch
from architectures.tiny_models import save_tiny
from killed import quantize_until, result_of
from packed import dequantized_model, logits, pack, some_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.core.settings import Tuned
from llmq.models.model_class import model_class
from llmq.models.model_source import ModelSource
from llmq.run.convert import ConvertConfig, convert
from llmq.verification.compare import VerifyConfig, relative_errors, verify

# A wrapper with a prefix elsewhere, experts one by one, another name of a layer, transposed weights.
RENAMED = ["gemma3", "qwen3_moe@mixed", "olmo_hybrid", "gpt2"]
IDS = some_tokens()


@pytest.fixture(scope="module", params=RENAMED)
def source(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, directory)
    return directory


def names_in(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


def opened(directory, text_file=None):
    return logits(llmq.load(directory, device="cpu", dtype=torch.float32), IDS)


def test_the_names_in_the_files_stay_and_every_way_to_open_them_gives_the_same(source, text_file, tmp_path):
    packed = pack(
        source,
        tmp_path / "packed",
        format="auto",
        method="awq",
        calibration=str(text_file),
        samples=8,
        sequence_length=32,
    )
    checkpoint = Checkpoint(packed)
    originals = {f"{name}.weight" for name in checkpoint.linears} | set(checkpoint.other_names)
    assert originals == names_in(source)
    wanted = opened(packed)
    assert bool(torch.isfinite(wanted).all())
    facts = verify(VerifyConfig(packed, reference=str(source), limit=1, sequence_length=32, text=str(text_file)))
    assert facts["layer_errors"].keys() == checkpoint.for_model(ModelSource(str(source)).skeleton).schemes.keys()
    assert facts["without_place"] == []
    for form in ("gptq", "awq"):
        copy = convert(ConvertConfig(packed, tmp_path / form, form))
        assert torch.equal(opened(copy), wanted)
        assert set(Checkpoint(copy).other_names) == set(checkpoint.other_names)
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config = {"quant_method": "llmq"}
    model = model_class(config).from_pretrained(packed, config=config, dtype=torch.float32)
    assert torch.equal(logits(model, IDS), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "saved") == names_in(packed)
    assert torch.equal(opened(tmp_path / "saved"), wanted)
    llmq.load(packed, device="cpu", dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert torch.equal(opened(tmp_path / "again"), wanted)


def test_layers_of_other_bits_have_them_under_both_names(source, tmp_path):
    block = ModelSource(str(source)).block_names[0]
    packed = pack(source, tmp_path / "packed", format="gptq", layer_bits=(f"{block}.*=8",))
    checkpoint = Checkpoint(packed)
    assert {scheme.bits for scheme in checkpoint.schemes.values()} == {4, 8}
    torch.testing.assert_close(opened(packed), logits(dequantized_model(source, packed), IDS), rtol=1e-4, atol=1e-4)


def test_names_of_the_model_and_of_the_files_are_both_ignored(tmp_path):
    save_tiny("gemma3", tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "packed", blocks="0")
    ignored = json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.language_model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj"} <= set(ignored)


@pytest.mark.parametrize("leaves", [("weight_packed", "weight_scale", "weight_shape"), ("weight_scale",)])
def test_a_linear_that_is_packed_under_two_names_is_refused(leaves, tmp_path):
    save_tiny("gemma3", tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    stored, in_model = (f"{prefix}.layers.0.mlp.up_proj" for prefix in ("language_model.model", "model.language_model"))
    tensors |= {f"{in_model}.{leaf}": tensors[f"{stored}.{leaf}"] + 1 for leaf in leaves}
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"are both stored for {in_model}"):
        opened(packed)


def test_a_packed_reference_has_the_names_and_layout_of_the_model(tmp_path):
    save_tiny("gpt2", tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "packed", format="gptq")
    half = pack(tmp_path / "source", tmp_path / "half", format="gptq", blocks="1")
    errors = relative_errors(Checkpoint(packed), str(half))
    assert all((0 < error < 0.2) == name.startswith("transformer.h.0") for name, error in errors.items())


@pytest.mark.parametrize(("name", "method"), [("gemma3", "tuned"), ("gpt2", "awq"), ("qwen3_moe@mixed", "awq")])
def test_a_killed_run_goes_on_to_the_same_bytes(name, method, text_file, tmp_path):
    save_tiny(name, tmp_path / "source")
    config = llmq.QuantizeConfig(
        str(tmp_path / "source"),
        tmp_path / "whole",
        method=method,
        group_size=32,
        calibration=str(text_file),
        samples=8,
        sequence_length=32,
        device="cpu",
        tuned=Tuned(steps=2, end_steps=2, end_samples=0),
    )
    llmq.quantize(config)
    now = replace(config, output=tmp_path / "killed")
    assert quantize_until(14, now) == -9
    assert quantize_until(0, replace(now, resume=True)) == 0
    assert result_of(now.output) == result_of(config.output)
