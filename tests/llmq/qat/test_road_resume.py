import os

import pytest
from trainings import report_of, stopped, train

from llmq.checkpoint.output_dir import UNFINISHED
from llmq.core.errors import RequestError
from llmq.qat.trainer import _Trainer


def stopped_at_config(replace):
    """A move of files that is stopped when it comes to config.json."""

    def moved(source, target):
        if str(target).endswith("part/config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    return moved


def test_an_interrupted_training_ends_in_the_bytes_of_one_that_was_not(llama, text, tmp_path, monkeypatch):
    options = {"bits": 2, "group_size": 32, "learn": "codes", "calibration_samples": 20}
    options |= {"activations": 8, "activation_scheme": "static"}
    whole = train(llama, text, tmp_path / "whole", **options)
    calls, step = [], _Trainer.training_step

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 11:  # in the sixth step; the last check was after the fourth
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(llama, text, tmp_path / "part", **options)
    assert not (tmp_path / "part" / "config.json").exists()
    with pytest.raises(RequestError, match="resume"):
        train(llama, text, tmp_path / "part", **options)
    with pytest.raises(RequestError, match=r"scale_rate: 0\.01, now 0\.02"):
        train(llama, text, tmp_path / "part", resume=True, **options | {"scale_rate": 0.02})
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", lambda *args, **kw: calls.append(1) or step(*args, **kw))
        calls.clear()
        part = train(llama, text, tmp_path / "part", resume=True, **options)
    assert len(calls) == 2 * 4  # steps five to eight, of two micro-batches
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"]["held_out"] == report_of(whole)["trained"]["held_out"]
    assert not (part / UNFINISHED).exists()
    again = (part / "model.safetensors").stat().st_mtime_ns
    train(llama, text, tmp_path / "part", resume=True, **options)
    assert (part / "model.safetensors").stat().st_mtime_ns == again


def test_a_process_that_is_killed_after_its_training_does_not_train_again(packed, text, tmp_path, monkeypatch):
    whole = train(packed, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.road._write", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part")
    assert not (tmp_path / "part" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.road.train_student", stopped)
        part = train(packed, text, tmp_path / "part", resume=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_training_that_ended_is_not_gone_on_with(packed, text, tmp_path, monkeypatch):
    """Over several epochs. transformers' Trainer itself would do one step more after the last one."""
    options = {"steps": 24, "learn": "codes"}
    whole = train(packed, text, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.outcome.Outcome.save", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part", **options)
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", stopped)
        part = train(packed, text, tmp_path / "part", resume=True, **options)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"] == report_of(whole)["trained"]


def test_a_process_that_is_killed_while_it_publishes_is_continued(packed, text, tmp_path, monkeypatch):
    whole = train(packed, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmq.checkpoint.writer.os.replace", stopped_at_config(os.replace))
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part")
    part = train(packed, text, tmp_path / "part", resume=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"]["held_out"] == report_of(whole)["trained"]["held_out"]


def test_the_work_of_another_program_is_not_resumed(llama, packed, text, tmp_path):
    work = tmp_path / "out" / UNFINISHED / "work"
    work.mkdir(parents=True)
    (work / "part-00000.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="another program"):
        train(packed, text, tmp_path / "out", resume=True)
