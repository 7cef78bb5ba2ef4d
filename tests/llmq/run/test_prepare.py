"""What a run needs before it begins: the text, what an earlier process left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import interrupted, small_run

import llmq
from llmq.core.distributed import ALONE
from llmq.core.errors import RequestError
from llmq.core.settings import Tuned
from llmq.run import prepare
from llmq.run.prepare import open_request

CPU = torch.device("cpu")


@pytest.fixture
def config(gemma, text_file, tmp_path):
    return small_run(gemma, text_file, tmp_path)


def opened(config):
    return open_request(config, CPU, ALONE, progress=False)


def test_text_that_the_model_wrote_is_kept_whole_or_not_at_all(config, monkeypatch):
    config = replace(config, calibration="self", samples=4)
    interrupted(config, monkeypatch)
    (path,) = config.output.rglob("tokens.safetensors")
    before = path.stat()
    interrupted(replace(config, resume=True), monkeypatch)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    llmq.quantize(replace(config, resume=True))


def test_a_method_that_needs_no_text_has_none_written(config):
    llmq.quantize(replace(config, method="rtn", calibration="self"))
    assert (config.output / "config.json").exists()


def test_a_resumed_run_gets_the_text_that_the_model_wrote_and_writes_none(config, monkeypatch):
    tuned = Tuned(end_steps=2, end_text="self", end_samples=3)
    config = replace(config, calibration="self", samples=4, method="tuned", tuned=tuned)
    interrupted(config, monkeypatch)
    first = opened(replace(config, output=config.output / "new"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "sequences_by", None)
        again = opened(replace(config, resume=True))
    assert torch.equal(again.tokens.train, first.tokens.train)
    assert torch.equal(again.tokens.held_out, first.tokens.held_out)
    assert torch.equal(again.training.train, first.training.train)
    assert first.training.train.shape == (3 + 3, 32)
    assert [step.finished["finished"] for step in again.steps] == [
        "outside the blocks",
        "model.layers.0",
    ]


def test_a_method_without_statistics_reads_no_text(config):
    request = opened(replace(config, method="rtn", calibration="nowhere.txt"))
    assert request.tokens.train.shape == (1, 16)
    assert len(request.tokens.held_out) == 0


def test_a_run_with_other_settings_is_not_resumed_and_the_first_difference_is_named(config, monkeypatch):
    interrupted(config, monkeypatch)
    with pytest.raises(RequestError, match=r"config.bits: 4, now 3 \(and 1 more\).\nGive the settings of that run"):
        opened(replace(config, bits=3, group_size=64, resume=True))
    assert len(opened(replace(config, resume=True)).steps) == 2
    assert opened(replace(config, overwrite=True)).steps == []


def test_the_model_itself_is_no_output_directory(config):
    with pytest.raises(RequestError, match="the model's own"):
        opened(replace(config, output=Path(config.model), overwrite=True))
