"""The check at the end of every run: it reads every tensor once, and has a block in memory at a time."""

from collections import Counter

import pytest
import torch
from packed import pack, rewrite
from tiny import save_tiny
from transformers.models.llama import modeling_llama

from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.models.safetensors_files import SafetensorsDirectory
from llmq.verification import check as checking
from llmq.verification.check import check

UP = "model.layers.1.mlp.up_proj"


def test_every_tensor_is_read_and_every_linear_decoded_once(sound, monkeypatch, never_whole):
    read, decoded = Counter(), Counter()
    of_files, of_linears = SafetensorsDirectory.read_all, Checkpoint.weight
    monkeypatch.setattr(SafetensorsDirectory, "read_all", lambda s, names: read.update(names) or of_files(s, names))
    monkeypatch.setattr(Checkpoint, "weight", lambda s, name, *_, **__: decoded.update([name]) or of_linears(s, name))
    check(sound, digests_of(Checkpoint(sound)))
    # Twice: digests_of is the first time.
    assert read == dict.fromkeys(Checkpoint(sound).files.names(), 2)
    assert decoded == dict.fromkeys(Checkpoint(sound).linears, 2)


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
