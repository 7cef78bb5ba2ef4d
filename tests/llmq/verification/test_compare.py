"""What verify says of sound checkpoints, and that it and the end of every run find damage."""

import json

import pytest
import torch
from commands import error_of, run_here
from packed import pack, rewrite
from tiny import save_tiny

from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.formats import compressed_tensors
from llmq.verification.compare import VerifyConfig, verify

LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, llama):
    return pack(llama, tmp_path_factory.mktemp("sound") / "packed", bits=3)


def test_a_sound_checkpoint_is_compared_with_what_was_computed(sound):
    found = verify(VerifyConfig(sound))
    assert found["packed_layers"] == 14
    assert found["compared_with_report"]
    recorded = json.loads((sound / "llmq_report.json").read_text())["digests"]
    assert recorded.keys() == {*Checkpoint(sound).linears, *Checkpoint(sound).other_names}


def test_without_a_report_it_is_decoded_and_run_all_the_same(checkpoint):
    (checkpoint / "llmq_report.json").unlink()
    assert not verify(VerifyConfig(checkpoint))["compared_with_report"]
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.full((64,), float("nan"))}))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        verify(VerifyConfig(checkpoint))


DAMAGE = {
    "a code": (f"{LINEAR}.weight_packed", lambda t: t ^ torch.eye(*t.shape, dtype=torch.int32)),
    "a scale": (f"{LINEAR}.weight_scale", lambda t: t * 1.01),
    "a norm": ("model.norm.weight", lambda t: t * 1.01),
    "an embedding": ("model.embed_tokens.weight", lambda t: t.flip(0).contiguous()),
    "a dtype": ("model.norm.weight", lambda t: t.half()),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_changed_tensor_is_named(checkpoint, part):
    name, change = DAMAGE[part]
    rewrite(checkpoint, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight_packed').removesuffix('.weight_scale')}"):
        verify(VerifyConfig(checkpoint))


def test_a_run_whose_files_are_not_what_it_computed_fails_and_leaves_nothing(llama, tmp_path, monkeypatch):
    def damaged(name, weight, scheme):
        tensors = encode(name, weight, scheme)
        if name == LINEAR:
            tensors[f"{name}.weight_packed"][0, 0] ^= 1
        return tensors

    encode = compressed_tensors.encode
    monkeypatch.setattr(compressed_tensors, "encode", damaged)
    with pytest.raises(CheckpointError, match=f"damaged: {LINEAR} is not what was computed"):
        pack(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_run_looks_at_the_files_and_not_at_memory(llama, tmp_path, monkeypatch):
    seen = []

    def check(directory, digests, trust_remote_code):
        seen.append(sorted(path.name for path in directory.iterdir()))
        assert digests.keys() == {*Checkpoint(directory).linears, *Checkpoint(directory).other_names}

    monkeypatch.setattr("llmq.run.block_loop.check", check)
    pack(llama, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {*seen[0]}


def test_the_error_to_a_reference_is_that_of_the_weights(sound, llama):
    found = verify(VerifyConfig(sound, str(llama), sequence_length=64, limit=2))
    assert found["layer_errors"].keys() == {*Checkpoint(sound).linears}
    assert all(0.01 < error < 0.5 for error in found["layer_errors"].values())
    assert found["kl"] > 0
    itself = verify(VerifyConfig(sound, str(sound), sequence_length=64, limit=2))
    assert set(itself["layer_errors"].values()) == {0.0}
    assert itself["kl"] == pytest.approx(0.0, abs=1e-6)


def test_another_model_is_no_reference(sound, tmp_path):
    other = save_tiny(tmp_path / "other", "llama-gqa", intermediate_size=128)
    with pytest.raises(RequestError, match="is another model"):
        verify(VerifyConfig(sound, str(other)))


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_command_prints_one_verdict(sound, arguments):
    done = run_here("llmq.verify", sound, *arguments)
    assert done.returncode == 0, done.stderr
    if arguments:
        assert json.loads(done.stdout)["packed_layers"] == 14
    else:
        assert "sound: 14 packed layers and 7 other tensors are what was computed" in done.stdout


def test_the_command_fails_on_damage_in_one_line(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    done = run_here("llmq.verify", checkpoint)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.norm.weight" in error_of(done)
    assert len(done.stderr.splitlines()) == 1
