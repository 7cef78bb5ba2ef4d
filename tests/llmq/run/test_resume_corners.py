"""Runs that are interrupted more than once, or where it hurts: overwriting, moving, training, written text."""

import shutil
from dataclasses import replace

import pytest
import torch
from killed import interrupted, quantize_until, result_of, small_run

import llmq
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.writer import Writer
from llmq.core.distributed import ALONE
from llmq.core.errors import CheckpointError, RequestError, WorkError
from llmq.core.settings import Tuned
from llmq.run.prepare import open_request
from llmq.run.resume import open_writer


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
def test_a_checkpoint_that_was_being_overwritten_is_not_taken_for_a_whole_one(finished, config, tmp_path, monkeypatch):
    config = replace(config, method="rtn")
    llmq.quantize(config)
    wanted = result_of(config.output)
    if not finished:
        interrupted(replace(config, overwrite=True), monkeypatch)
    before = config.output.rename(tmp_path / "before")
    for moment in range(1, 9):
        shutil.rmtree(config.output, ignore_errors=True)
        shutil.copytree(before, config.output)
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
    check, calls = llmq.run.block_loop.check, []

    def checks(*arguments):
        calls.append(arguments)
        if len(calls) == which:
            raise CheckpointError("damaged")
        check(*arguments)

    monkeypatch.setattr("llmq.run.block_loop.check", checks)
    with pytest.raises(CheckpointError, match="damaged"):
        llmq.quantize(replace(trained, resume=resumed))
    assert len(calls) == which
    assert not list(trained.output.glob("*"))


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


def test_a_second_run_that_is_refused_leaves_the_hidden_states_of_the_first(config, tmp_path, monkeypatch):
    """Both were started at once: the second sees no claim before its own fails."""
    states = tmp_path / "states" / "llmq-0123-0.partial"
    states.mkdir(parents=True)
    (states / "a.states").write_bytes(b"of the first run")
    request = open_request(config, torch.device("cpu"), ALONE, progress=False)
    refused = pytest.raises(RequestError, match="another process writes")
    with Writer(config.output), refused, open_writer(request, states):
        pass
    assert (states / "a.states").exists()
