"""The check at the end of every run: it reads every tensor once, and has a block in memory at a time."""

import shutil
import weakref
from collections import Counter

import pytest
import torch
from packed import dequantized_model, logits, pack, rewrite
from tiny import save_tiny
from transformers.models.llama import modeling_llama

import llmq
from llmq.checkpoint.digests import DigestingCheckpoint, digests_of
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.model_source import build_skeleton
from llmq.models.safetensors_files import SafetensorsDirectory
from llmq.runtime.model_config import model_config
from llmq.verification import check as checking
from llmq.verification.check import check
from llmq.verification.on_demand import read_when_called

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, llama):
    return pack(llama, tmp_path_factory.mktemp("sound") / "packed")


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "packed")


@pytest.fixture
def never_whole(monkeypatch):
    """Fail if the whole model is loaded."""

    def load(*_):
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr(checking, "load", load)


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


@pytest.mark.parametrize("options", [{"format": "gptq", "bits": 3}, {"format": "awq"}, {"bits": 8, "group_size": -1}])
def test_every_format_runs_from_its_files(options, tmp_path, never_whole):
    source = save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16)  # with biases and tied embeddings
    directory = pack(source, tmp_path / "packed", **options)
    expected = logits(dequantized_model(source, directory), IDS)
    torch.testing.assert_close(logits(skeleton(directory), IDS), expected, rtol=1e-4, atol=1e-5)
    check(directory, digests_of(Checkpoint(directory)))


def test_weights_in_strips_are_the_weights(sound, llama, monkeypatch):
    monkeypatch.setattr(llmq.verification.on_demand, "_STRIP", 7 * 64)  # rows in sevens, of 64 and of 96 inputs
    expected = logits(dequantized_model(llama, sound), IDS)
    torch.testing.assert_close(logits(skeleton(sound), IDS), expected, rtol=1e-4, atol=1e-5)


def test_only_one_block_is_in_memory_at_a_time_and_of_its_packed_linears_one(sound, monkeypatch):
    model, seen = skeleton(sound), []
    decoded: list[weakref.ref[QuantizedWeight]] = []
    of_linears = Checkpoint.weight

    def weight(self, name):
        assert all(earlier() is None for earlier in decoded)
        assert all(parameter.startswith(name[: len("model.layers.0.")]) for parameter in off_meta(model))
        found = of_linears(self, name)
        decoded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Checkpoint, "weight", weight)
    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, i=i: seen.append((i, off_meta(model))))
    logits(model, IDS)
    assert len(decoded) == 21
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    assert seen == [(i, {f"model.layers.{i}.{norm}" for norm in norms}) for i in range(3)]
    assert off_meta(model) == set()


def test_every_tensor_is_read_and_every_linear_decoded_once(sound, monkeypatch, never_whole):
    read, decoded = Counter(), Counter()
    of_files, of_linears = SafetensorsDirectory.read, Checkpoint.weight
    monkeypatch.setattr(SafetensorsDirectory, "read", lambda s, name: read.update([name]) or of_files(s, name))
    monkeypatch.setattr(Checkpoint, "weight", lambda s, name, _=None: decoded.update([name]) or of_linears(s, name))
    check(sound, digests_of(Checkpoint(sound)))
    # Twice: digests_of is the first time.
    assert read == dict.fromkeys(Checkpoint(sound).files.names(), 2)
    assert decoded == dict.fromkeys(Checkpoint(sound).linears, 2)


def test_what_was_noted_is_the_digest_of_everything(sound):
    noted = DigestingCheckpoint(sound)
    for name in noted.linears:
        noted.weight(name)
    for name in noted.other_names:
        noted.read(name)
    assert noted.digests == digests_of(Checkpoint(sound))


def test_a_model_whose_scales_overflow_is_refused(tmp_path, never_whole):
    directory = pack(save_tiny(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "packed")
    huge = lambda tensors: tensors[f"{UP}.weight_scale"].fill_(3e38)  # noqa: E731 finite; eight times as much is not
    rewrite(directory, huge)
    for digests in (None, digests_of(Checkpoint(directory))):
        with pytest.raises(CheckpointError, match="the model computes NaN or infinity"):
            check(directory, digests)


@pytest.mark.parametrize("digests", ["with", "without"])
def test_codes_that_were_not_computed_are_refused_by_their_digest_alone(checkpoint, digests, never_whole):
    computed = digests_of(Checkpoint(checkpoint)) if digests == "with" else None
    rewrite(checkpoint, lambda tensors: tensors[f"{UP}.weight_packed"].bitwise_xor_(1))
    if computed is None:
        check(checkpoint, None)
    else:
        with pytest.raises(CheckpointError, match=f"damaged: {UP} is not what was computed; quantize again"):
            check(checkpoint, computed)


def test_a_tensor_too_many_is_named_as_such(checkpoint, never_whole):
    computed = digests_of(Checkpoint(checkpoint))
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.surprise": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.surprise is on one side only"):
        check(checkpoint, computed)
    with pytest.raises(CheckpointError, match=r"holds an unknown tensor model\.layers\.0\.surprise"):
        check(checkpoint, None)


DAMAGE = {
    "codes cut": lambda tensors: tensors.update({f"{UP}.weight_packed": tensors[f"{UP}.weight_packed"][:-1].clone()}),
    "a NaN scale": lambda tensors: tensors[f"{UP}.weight_scale"].fill_(float("nan")),
    "a smaller linear": lambda tensors: tensors.update(
        {f"{UP}.{part}": tensors[f"{UP}.{part}"][:64].clone() for part in ("weight_packed", "weight_scale")}
        | {f"{UP}.weight_shape": torch.tensor([64, 64])}
    ),
}


@pytest.mark.parametrize("runs", [True, False], ids=["", "in a linear that never runs"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_linear_is_refused(damage, runs, checkpoint, monkeypatch, never_whole):
    if not runs:
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda _, x: x)
    check(checkpoint, None)
    rewrite(checkpoint, DAMAGE[damage])
    with pytest.raises(CheckpointError, match=UP):
        check(checkpoint, None)


@pytest.mark.parametrize("where", ["inside a block", "outside of blocks"])
def test_weights_may_be_used_without_calling_the_module_that_holds_them(where, sound, monkeypatch):
    whole = []
    load = checking.load
    monkeypatch.setattr(checking, "load", lambda *arguments: whole.append(1) or load(*arguments))
    holder = modeling_llama.LlamaDecoderLayer if where == "inside a block" else modeling_llama.LlamaModel
    forward = holder.forward

    def direct(self, *args, **kwargs):
        norm = self.input_layernorm if where == "inside a block" else self.norm
        assert float(norm.weight.sum()) > 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(holder, "forward", direct)
    check(sound, digests_of(Checkpoint(sound)))
    assert len(whole) == (where == "outside of blocks")  # a block is there as a whole; for others it must be the model
