"""Runs that are interrupted more than once, or where it hurts: overwriting, moving, training, written text."""

from dataclasses import replace

import pytest
import torch
from killed import interrupted, quantize_until, result_of, small_run
from safetensors.torch import save_file

import llmq
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.shard_join import join
from llmq.core.errors import CheckpointError, RequestError, WorkError
from llmq.core.settings import Tuned


@pytest.fixture
def config(gemma, text_file, tmp_path):
    return small_run(gemma, text_file, tmp_path)


def test_states_of_one_run_are_not_taken_for_those_of_another(config, tmp_path, monkeypatch):
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    first, second = (replace(config, offload_dir=tmp_path / name, resume=True) for name in ("first", "second"))
    interrupted(first, monkeypatch)
    interrupted(second, monkeypatch)  # has written files of its own, but finished no other block
    assert list((tmp_path / "second").rglob("*.states"))
    llmq.quantize(second)
    assert result_of(config.output) == result_of(tmp_path / "whole")
    assert list((tmp_path / "second").iterdir()) == []


def test_states_are_gone_with_a_run_that_leaves_nothing(config, tmp_path, monkeypatch):
    config = replace(config, offload_dir=tmp_path / "states")
    interrupted(config, monkeypatch, blocks=0)
    assert not config.output.exists()
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_that_was_being_overwritten_is_not_taken_for_a_whole_one(finished, config, monkeypatch):
    config = replace(config, method="rtn")
    llmq.quantize(config)
    wanted = result_of(config.output)
    for moment in range(1, 9):
        llmq.quantize(replace(config, overwrite=True))
        if not finished:
            interrupted(replace(config, overwrite=True), monkeypatch)
        assert quantize_until(moment, replace(config, overwrite=True)) == -9
        if quantize_until(0, replace(config, resume=True)) == 0:
            assert result_of(config.output) == wanted, moment
        else:
            assert not (config.output / REPORT).exists(), moment
            with pytest.raises(RequestError, match="--overwrite"):
                llmq.quantize(replace(config, resume=True))


@pytest.fixture
def trained(config):
    return replace(config, method="tuned", tuned=Tuned(end_steps=2, end_samples=0))


def test_a_run_goes_on_if_it_ends_while_the_checkpoint_to_train_is_moved(trained, tmp_path, monkeypatch):
    llmq.quantize(replace(trained, output=tmp_path / "whole"))
    replaced = llmq.checkpoint.writer.os.replace

    def replace_all_but_the_last(source, target):
        if target.name == "config.json" and target.parent.name == "first":
            raise KeyboardInterrupt
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(llmq.checkpoint.writer.os, "replace", replace_all_but_the_last)
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(trained)
    llmq.quantize(replace(trained, resume=True))
    assert result_of(trained.output) == result_of(tmp_path / "whole")


@pytest.mark.parametrize("which", [1, 2], ids=["before training", "after it"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_damaged_checkpoint_leaves_nothing_to_resume(which, resumed, trained, monkeypatch):
    if resumed:
        interrupted(trained, monkeypatch)
    check, calls = llmq.pipeline.check, []

    def checks(*arguments):
        calls.append(arguments)
        if len(calls) == which:
            raise CheckpointError("damaged")
        check(*arguments)

    monkeypatch.setattr("llmq.pipeline.check", checks)
    with pytest.raises(CheckpointError, match="damaged"):
        llmq.quantize(replace(trained, resume=resumed))
    assert len(calls) == which
    assert not list(trained.output.glob("*"))


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


def test_an_error_is_told_even_where_nothing_can_be_removed(config, monkeypatch):
    config.output.mkdir()

    def clear(_):
        raise PermissionError(13, "Permission denied")

    def add(*_):
        monkeypatch.setattr("llmq.checkpoint.writer.clear", clear)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("llmq.run.journal.Journal.add", add)
    with pytest.raises(WorkError, match="Read-only file system"):
        llmq.quantize(config)


@pytest.mark.parametrize("dry_run", [False, True])
def test_hidden_states_cannot_wait_in_a_file(dry_run, config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(RequestError, match="cannot wait in"):
            llmq.quantize(replace(config, offload_dir=place, dry_run=dry_run))
    assert not config.output.exists()


def test_a_part_that_was_cut_off_is_an_error(tmp_path):
    part = tmp_path / "part.safetensors"
    save_file({"a": torch.zeros(8)}, part)
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(OSError, match="shorter than it was written"):
        join([part], tmp_path / "joined")
