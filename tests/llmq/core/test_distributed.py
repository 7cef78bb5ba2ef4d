"""Several processes that work together end in the bytes of one."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import quantize_together, result_of
from tiny import save_tiny

import llmq
from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.core.distributed import Ranks, joined_ranks
from llmq.core.errors import RequestError, WorkError
from llmq.models.untrusted_files import read_json
from llmq.run.journal import read_journal
from llmq.run.resume import Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama-gqa", torch.bfloat16)


@pytest.fixture
def config(model, text_file, tmp_path):
    settings = {"samples": 60, "sequence_length": 128, "group_size": 32, "device": "cpu"}
    return llmq.QuantizeConfig(model=str(model), output=tmp_path / "one", calibration=str(text_file), **settings)


@pytest.fixture(scope="module")
def of_one():
    """A function that returns what one process makes of a request; it works once for equal ones."""
    made = {}

    def of_one(config):
        request = str(replace(config, output=Path("out")))
        if request not in made:
            made[request] = result_of(llmq.quantize(config))
        return made[request]

    return of_one


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({}, 2),
        ({}, 3),
        ({"method": "awq+gptq"}, 3),
        ({"effort": "best"}, 2),
        ({"method": "rtn"}, 2),
        ({"budget": 3.8}, 2),
    ],
    ids=str,
)
def test_together_they_write_the_bytes_of_one(of_one, changes, processes, config, tmp_path):
    config = replace(config, **changes)
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together")
    assert quantize_together(together, processes) == [0] * processes
    assert result_of(together.output) == wanted


def test_rows_that_fill_no_multiple_are_the_same_too(of_one, config, tmp_path):
    model = save_tiny(
        tmp_path / "model", "arcee", torch.bfloat16, intermediate_size=264
    )  # up_proj alone: 16.5 times 16
    config = replace(config, model=str(model))
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together")
    assert quantize_together(together, 2) == [0, 0]
    assert result_of(together.output) == wanted


def test_more_processes_than_shares_of_the_text_help_with_the_rows(of_one, config, tmp_path):
    config = replace(config, samples=4, sequence_length=256)
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together")
    assert quantize_together(together, 4) == [0] * 4
    assert result_of(together.output) == wanted


def test_hidden_states_on_disk_are_each_process_own(of_one, config, tmp_path):
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together", offload_dir=tmp_path / "states")
    assert quantize_together(together, 2) == [0, 0]
    assert result_of(together.output) == wanted
    assert not list((tmp_path / "states").iterdir())


def test_one_that_dies_ends_the_others_and_any_number_goes_on(of_one, config, tmp_path, capfd):
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together")

    def fails(rank):
        if rank == 1:
            enter = llmq.calibration.block_stream._StreamedStates.enter

            def dies(self, index, *arguments):
                if index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return enter(self, index, *arguments)

            llmq.calibration.block_stream._StreamedStates.enter = dies

    started = time.monotonic()
    assert quantize_together(together, 2, fails) == [1, -9]
    assert time.monotonic() - started < 60
    assert "another process of this run ended" in capfd.readouterr().err
    assert not (together.output / "config.json").exists()
    assert quantize_together(replace(together, resume=True), 3) == [0, 0, 0]
    assert result_of(together.output) == wanted


def test_a_block_is_finished_when_the_hidden_states_of_all_processes_have_passed_it(of_one, config, tmp_path):
    together = replace(config, output=tmp_path / "together", offload_dir=tmp_path / "states")

    def fails(rank):
        if rank == 1:
            commit = Progress.commit

            def dies(self):
                if self._open is not None and self._open[0].endswith(".1"):
                    os.kill(os.getpid(), signal.SIGKILL)
                commit(self)

            Progress.commit = dies

    assert quantize_together(together, 2, fails) == [1, -9]
    steps = read_journal(together.output / PROGRESS)[1]
    assert [step.finished["finished"] for step in steps] == ["outside the blocks", "model.layers.0"]
    assert quantize_together(replace(together, resume=True), 2) == [0, 0]
    wanted = of_one(config)
    assert result_of(together.output) == wanted


def test_processes_have_nothing_to_do_where_only_the_moving_is_left(of_one, config, tmp_path):
    together = replace(config, output=tmp_path / "together", method="rtn")

    def fails(rank):
        moved = os.replace

        def dies(source, target):
            if target == together.output / "config.json":
                os.kill(os.getpid(), signal.SIGKILL)
            moved(source, target)

        llmq.checkpoint.writer.os.replace = dies

    assert quantize_together(together, 2, fails) == [-9, 0]
    assert not (together.output / "config.json").exists()
    assert quantize_together(replace(together, resume=True), 2) == [0, 0]
    assert quantize_together(replace(together, resume=True), 2) == [0, 0]
    wanted = of_one(replace(config, method="rtn"))
    assert result_of(together.output) == wanted


def test_hidden_states_that_go_to_disk_by_themselves_are_not_in_the_way(of_one, config, tmp_path):
    wanted = of_one(config)
    together = replace(config, output=tmp_path / "together")

    def fails(rank):
        llmq.plan.workload._MEMORY_SHARE = 0.0
        if rank == 0:  # the other one is ready long before
            prove = llmq.pipeline.prove
            llmq.pipeline.prove = lambda run: (time.sleep(1), prove(run))

    assert quantize_together(together, 2, fails) == [0, 0]
    assert result_of(together.output) == wanted
    assert any("wait on disk" in note["note"] for note in read_json(together.output, REPORT)["notes"])


def test_processes_that_cannot_meet_are_a_wrong_request(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RequestError, match=r"WORLD_SIZE says 2 processes, but .*RANK.* not set"):
        llmq.quantize(config)


def test_a_wrong_request_ends_all(config, tmp_path, capfd):
    tmp_path.joinpath("there").mkdir()
    tmp_path.joinpath("there", "notes.md").write_text("mine")
    assert quantize_together(replace(config, output=tmp_path / "there"), 2) == [1, 1]
    assert "is not empty" in capfd.readouterr().err


def test_training_needs_one_process(config, monkeypatch):
    from llmq.run.prepare import open_request

    with pytest.raises(RequestError, match="one process"):
        open_request(replace(config, method="tuned"), torch.device("cpu"), Ranks(1, 2), False)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [16, 32, 64, 960, 100])
def test_rows_are_shared_out_in_multiples_and_none_is_left(count, size):
    parts = Ranks(0, size).rows(count, 16)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % 16 == 0 for part in parts)
    assert max(part.stop - part.start for part in parts) - count / size < 32


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Connection closed by peer [127.0.0.1]", "another process of this run ended"),
        ("tensor has the wrong size", "the processes cannot exchange data: tensor has the wrong size"),
        ("", "the processes cannot exchange data: no reason given"),
    ],
)
def test_only_a_closed_connection_is_told_as_the_end_of_another_process(said, told, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr("torch.distributed.all_gather_object", fail)
    with pytest.raises(WorkError, match=told):
        Ranks(0, 2).each(1)


def test_processes_that_cannot_meet_are_told_so(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorkError, match="the 2 processes cannot meet: "), joined_ranks(torch.device("cpu")):
        pass
