"""A run that is killed goes on to the same bytes, and nothing of it looks finished before it is."""

import json
from dataclasses import replace

import pytest
import torch
from architectures import tiny_models
from killed import interrupted, quantize_until, result_of, small_run
from tiny import save_tiny

import llmq
from llmq.calibration.block_stream import _StreamedStates
from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.settings import Tuned
from llmq.run.journal import read_journal


@pytest.fixture
def config(gemma, text_file, tmp_path):
    return small_run(gemma, text_file, tmp_path)


def killed_and_resumed(config, moments, tmp_path):
    """How many of a run's changes of the disk there are, each of which (or some) a run was killed at."""
    whole = replace(config, output=tmp_path / "whole")
    llmq.quantize(whole)  # here, so that the processes below begin with all that is imported and compiled on the way
    wanted = result_of(whole.output)
    assert quantize_until(0, replace(config, output=tmp_path / "counted"), tmp_path / "count") == 0
    assert result_of(tmp_path / "counted") == wanted
    count = int((tmp_path / "count").read_text())
    for moment in moments(count):
        now = replace(config, output=tmp_path / f"killed-{moment}")
        assert quantize_until(moment, now) == -9, moment
        if (now.output / "config.json").exists():
            assert result_of(now.output) == wanted, moment
        assert quantize_until(0, replace(now, resume=True)) == 0, moment
        assert result_of(now.output) == wanted, moment
        assert not list(now.output.glob("*.partial")), moment
    return count


def some(number):
    """So many moments, evenly spread; what lies before all work or after it is the same for all of the tests below."""
    return lambda count: [count * (i + 1) // (number + 1) for i in range(number)]


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(config, tmp_path):
    # Most changes are made while the result is put together, and the last ones are the most delicate.
    assert (
        killed_and_resumed(config, lambda count: [*range(1, count - 12, 7), *range(count - 12, count + 1)], tmp_path)
        > 40
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "awq+gptq"},
        {"method": "rtn"},
        {"effort": "best", "bits": 3},
        {"format": "gptq", "blocks": "0"},
        {"method": "tuned", "tuned": Tuned(steps=2, end_steps=0)},
    ],
    ids=str,
)
def test_so_it_does_with_other_methods(changes, config, tmp_path):
    killed_and_resumed(replace(config, **changes), some(2), tmp_path)


def test_so_it_does_with_hidden_states_on_disk(config, tmp_path):
    (tmp_path / "states").mkdir()
    killed_and_resumed(replace(config, offload_dir=tmp_path / "states"), some(4), tmp_path)
    assert not list((tmp_path / "states").iterdir())


def test_so_it_does_between_two_experts_whose_tensors_are_saved_one_after_the_other(text_file, tmp_path):
    tiny_models.save_tiny("qwen3_moe", tmp_path / "model")
    config = replace(small_run(tmp_path / "model", text_file, tmp_path), format="compressed-tensors")
    killed_and_resumed(config, some(3), tmp_path)


def test_so_it_does_when_trained_from_end_to_end(config, tmp_path):
    settings = Tuned(end_steps=2, end_samples=0)
    killed_and_resumed(replace(config, method="tuned", tuned=settings), some(3), tmp_path)


@pytest.mark.parametrize("on_disk", [False, True])
def test_finished_blocks_are_not_solved_again(on_disk, config, tmp_path, monkeypatch):
    config = replace(config, offload_dir=tmp_path / "states" if on_disk else None)
    interrupted(config, monkeypatch)
    entered, enter = [], _StreamedStates.enter

    def spy(self, index, *arguments):
        entered.append(index)
        return enter(self, index, *arguments)

    monkeypatch.setattr(_StreamedStates, "enter", spy)
    llmq.quantize(replace(config, resume=True))
    assert entered == ([1] if on_disk else [0, 1])
    report = json.loads((config.output / REPORT).read_text())
    assert [group["block"] for group in report["groups"]] == [f"model.layers.{i}" for i in range(2) for _ in range(4)]
    assert report["resumed"] == ["model.layers.0"]


def test_hidden_states_on_disk_are_not_believed_after_the_machine_went_down(config, tmp_path, monkeypatch):
    config = replace(config, offload_dir=tmp_path / "states")
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    interrupted(config, monkeypatch)
    for path in (tmp_path / "states").rglob("*.states"):
        path.write_bytes(bytes(path.stat().st_size))
    monkeypatch.setattr("llmq.run.resume._boot", lambda: "another")
    llmq.quantize(replace(config, resume=True))
    assert result_of(config.output) == result_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "config.bits: 4, now 3"),
        ({"seed": 5}, "config.seed: 0, now 5"),
        ({"effort": "fast"}, "config.effort"),
    ],
    ids=str,
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_request_is_refused_and_told_what_differs(finished, changes, said, config, monkeypatch):
    if finished:
        llmq.quantize(config)
    else:
        interrupted(config, monkeypatch)
    before = result_of(config.output)
    with pytest.raises(RequestError, match=said):
        llmq.quantize(replace(config, resume=True, **changes))
    assert result_of(config.output) == before


def test_a_changed_model_or_text_is_refused(config, gemma, text_file, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", "gemma2", torch.bfloat16, seed=1)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[::-1])
    interrupted(config, monkeypatch)
    for changes, said in (({"model": str(model)}, "source"), ({"calibration": str(text)}, "calibration")):
        with pytest.raises(RequestError, match=said):
            llmq.quantize(replace(config, resume=True, **changes))


def test_where_there_is_nothing_to_resume_the_run_begins(config):
    llmq.quantize(replace(config, resume=True))
    first = result_of(config.output)
    report = (config.output / REPORT).read_bytes()
    llmq.quantize(replace(config, resume=True))  # and where it is finished it ends
    assert result_of(config.output) == first
    assert (config.output / REPORT).read_bytes() == report


def test_an_unfinished_run_is_refused_unless_resumed_or_overwritten(config, monkeypatch):
    interrupted(config, monkeypatch)
    assert not (config.output / "config.json").exists()
    with pytest.raises(RequestError, match=r"unfinished run.*--resume.*--overwrite"):
        llmq.quantize(config)
    llmq.quantize(replace(config, overwrite=True))
    assert "resumed" in json.loads((config.output / REPORT).read_text())


def test_overwrite_and_resume_exclude_each_other(config):
    with pytest.raises(RequestError, match="one of the two"):
        replace(config, overwrite=True, resume=True)


def test_damage_found_at_the_end_leaves_nothing_to_resume(config, monkeypatch):
    def check(*_):
        raise CheckpointError("damaged")

    monkeypatch.setattr("llmq.run.block_loop.check", check)
    with pytest.raises(CheckpointError, match="damaged"):
        llmq.quantize(config)
    assert not config.output.exists()


def test_progress_is_one_json_object_a_line_and_a_line_per_group(config):
    llmq.quantize(config)
    lines = [json.loads(line) for line in (config.output / PROGRESS).read_text().splitlines()]
    groups = [line for line in lines if "linears" in line]
    assert len(groups) == 2 * 4
    assert all(0 < line["error"] < 1 and line["peak_memory_bytes"] > 1e8 for line in groups)
    assert [line["at"] for line in groups] == sorted(line["at"] for line in groups)
    finished = [line["finished"] for line in lines if "finished" in line]
    assert finished == ["outside the blocks", *(f"model.layers.{i}" for i in range(2))]


def test_a_line_cut_off_in_the_middle_does_not_count(config, monkeypatch):
    interrupted(config, monkeypatch)
    path = config.output / PROGRESS
    path.write_bytes(path.read_bytes()[:-10])
    assert [step.finished["finished"] for step in read_journal(path)[1]] == ["outside the blocks"]
