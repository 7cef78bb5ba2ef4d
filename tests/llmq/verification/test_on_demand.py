"""A packed model runs from its files, and only the weights that run are in memory."""

import weakref

import pytest
import torch
from packed import dequantized_model, logits, pack, rewrite
from tiny import save_tiny

from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.model_source import build_skeleton
from llmq.runtime.model_config import model_config
from llmq.verification import on_demand
from llmq.verification.check import check
from llmq.verification.on_demand import read_when_called

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(16)[None]


def skeleton(directory):
    checkpoint = Checkpoint(directory)
    model = build_skeleton(model_config(checkpoint))
    read_when_called(model, checkpoint)
    return model


def off_meta(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.device.type != "meta"}


ARCHITECTURES = ["llama-gqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_run_from_its_files_computes_what_the_whole_one_does(name, tmp_path, never_whole):
    source = save_tiny(tmp_path / "source", name)
    directory = pack(source, tmp_path / "packed", symmetric=False)
    check(directory, digests_of(Checkpoint(directory)))
    expected = logits(dequantized_model(source, directory), IDS)
    torch.testing.assert_close(logits(skeleton(directory), IDS), expected, rtol=1e-4, atol=1e-5)


def test_code_may_ask_the_embeddings_for_their_device(sound, monkeypatch):
    """Llama-4 does."""
    model = skeleton(sound)
    forward, asked = model.model.forward, []

    def asking(*args, **kwargs):
        asked.append(model.model.embed_tokens.weight.device.type)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", asking)
    logits(model, IDS)
    assert asked == ["cpu"]
    assert model.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize("options", [{"format": "gptq", "bits": 3}, {"format": "awq"}, {"bits": 8, "group_size": -1}])
def test_every_format_runs_from_its_files(options, tmp_path, never_whole):
    source = save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16)  # with biases and tied embeddings
    directory = pack(source, tmp_path / "packed", **options)
    expected = logits(dequantized_model(source, directory), IDS)
    torch.testing.assert_close(logits(skeleton(directory), IDS), expected, rtol=1e-4, atol=1e-5)
    check(directory, digests_of(Checkpoint(directory)))


def test_weights_in_strips_are_the_weights(sound, llama, monkeypatch):
    monkeypatch.setattr(on_demand, "_STRIP", 7 * 64)  # rows in sevens, of 64 and of 96 inputs
    expected = logits(dequantized_model(llama, sound), IDS)
    torch.testing.assert_close(logits(skeleton(sound), IDS), expected, rtol=1e-4, atol=1e-5)


def test_only_one_block_is_in_memory_at_a_time_and_of_its_packed_linears_one(sound, monkeypatch):
    model, seen = skeleton(sound), []
    decoded: list[weakref.ref[QuantizedWeight]] = []
    of_linears = Checkpoint.weight

    def weight(self, name, **options):
        assert all(earlier() is None for earlier in decoded)
        assert all(parameter.startswith(name[: len("model.layers.0.")]) for parameter in off_meta(model))
        found = of_linears(self, name, **options)
        decoded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Checkpoint, "weight", weight)
    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, i=i: seen.append((i, off_meta(model))))
    logits(model, IDS)
    assert len(decoded) == 14
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    assert seen == [(i, {f"model.layers.{i}.{norm}" for norm in norms}) for i in range(2)]
    assert off_meta(model) == set()


def test_a_damaged_weight_is_an_error_when_its_linear_is_called_and_not_before(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors[f"{UP}.weight_scale"].fill_(float("nan")))
    model = skeleton(checkpoint)
    model.model.layers[0].mlp.up_proj(torch.ones(1, 64))
    with pytest.raises(CheckpointError, match=UP):
        model.model.layers[1].mlp.up_proj(torch.ones(1, 64))
