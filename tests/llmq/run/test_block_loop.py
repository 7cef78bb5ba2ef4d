"""Only the chosen blocks are quantized, and every tensor of the model is written once."""

import json

import pytest
import torch
from packed import pack
from small_runs import run

from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.models.model_source import ModelSource
from llmq.run import block_loop
from llmq.runtime.load import load
from llmq.runtime.packed_linear import PackedLinear


@pytest.mark.parametrize(("method", "blocks"), [("gptq", "1"), ("gptq", "0,2"), ("rtn", "0"), ("rtn", "1-2")])
def test_blocks_that_are_not_chosen_keep_their_weights(method, blocks, tmp_path, deep_llama, text_file):
    output = run(deep_llama, text_file, tmp_path / "out", method=method, blocks=blocks)
    chosen = {"0": [0], "1": [1], "0,2": [0, 2], "1-2": [1, 2]}[blocks]
    model, original = load(output, device="cpu"), ModelSource(str(deep_llama))
    for i, block in enumerate(model.model.layers):
        weight = block.mlp.up_proj
        assert isinstance(weight, PackedLinear) == (i in chosen)
        if i not in chosen:
            assert torch.equal(weight.weight, original.read(f"model.layers.{i}.mlp.up_proj.weight"))
    assert {int(name.split(".")[2]) for name in Checkpoint(output).linears} == set(chosen)


def test_blocks_before_the_chosen_ones_distort_nothing(tmp_path, deep_llama, text_file):
    """What the first chosen block sees is the original model's, and it gets the codes it gets when it comes first."""
    report = json.loads((run(deep_llama, text_file, tmp_path / "out", blocks="1-2") / REPORT).read_text())
    assert report["drifts"]["model.layers.1"] == 0
    assert report["drifts"]["model.layers.2"] > 0


def test_every_tensor_is_written_once_and_those_of_a_module_together(llama, tmp_path, monkeypatch):
    written = []
    save = block_loop.Progress.save

    def spy(self, name, tensors, *arguments):
        tensors = list(tensors)
        written.extend((name, set(of_module)) for of_module in tensors)
        save(self, name, tensors, *arguments)

    monkeypatch.setattr(block_loop.Progress, "save", spy)
    pack(llama, tmp_path / "out", blocks="0")
    source = ModelSource(str(llama))
    untouched = [name for block in source.block_names[1:] for name in source.block_tensor_names(block)]
    outside = [(step, names) for step, names in written if step == "outside the blocks"]
    assert [names for _, names in outside] == [{name} for name in source.outer_names()]
    modules = [(step, names) for step, names in written if step in source.block_names[1:]]
    assert sorted(name for _, names in modules for name in names) == sorted(untouched)
    assert all(len({name.rpartition(".")[0] for name in names}) == 1 for _, names in modules)


def test_a_checkpoint_that_fails_the_check_is_not_published(llama, tmp_path, monkeypatch):
    def check(directory, digests, _):
        assert not (tmp_path / "out" / "config.json").exists()
        assert (directory / "config.json").exists()
        assert digests.keys() > {"model.layers.0.mlp.up_proj", "model.embed_tokens.weight"}
        raise CheckpointError("damaged")

    monkeypatch.setattr(block_loop, "check", check)
    with pytest.raises(CheckpointError, match="damaged"):
        pack(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
