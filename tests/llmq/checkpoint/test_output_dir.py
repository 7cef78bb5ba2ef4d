"""One process at a time writes to a directory, and a resumed run knows which request it continues."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from commands import error_of, run_here
from written import names_in

import llmq
from llmq.checkpoint.output_dir import PICTURE, PROGRESS, REPORT, Claim, check_output, clear, write_json
from llmq.checkpoint.writer import Writer
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError, WorkError

_HOLD = """
import sys
from pathlib import Path
from llmq.checkpoint.output_dir import Claim
Claim(Path(sys.argv[1]))
print(flush=True)
input()
"""


@pytest.fixture
def config(llama, tmp_path):
    return QuantizeConfig(model=str(llama), output=tmp_path / "out", method="rtn", group_size=32)


def test_a_directory_that_another_process_writes_to_is_refused_until_that_ends(tmp_path, llama):
    (tmp_path / "notes.md").write_text("mine")
    other = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        for more in ((), ("--overwrite",), ("--resume",)):
            result = run_here("llmq.quantize", "--model", llama, "--output", tmp_path, "--method", "rtn", *more)
            assert result.returncode == 2
            assert f"another process writes to {tmp_path}" in error_of(result)
        assert names_in(tmp_path) == ["notes.md"]
    finally:
        other.kill()
        other.communicate()
    check_output(tmp_path, overwrite=True)


def test_a_writer_claims_its_directory_until_it_ends(tmp_path):
    with Writer(tmp_path), pytest.raises(RequestError, match="another process writes"):
        Claim(tmp_path)
    Claim(tmp_path).release()
    with pytest.raises(WorkError), Writer(tmp_path, overwrite=True):
        raise OSError("the disk is gone")
    Claim(tmp_path).release()


def test_where_directories_cannot_be_locked_nobody_is_refused(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(9, "Bad file descriptor")

    first = Claim(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    Claim(tmp_path).release()
    first.release()
    first.release()


def test_what_llmq_wrote_is_cleared_and_nothing_else(tmp_path):
    for name in ("config.json", "model.safetensors", REPORT, PROGRESS, PICTURE, "mine.json", "mine.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "unfinished.partial" / "work").mkdir(parents=True)
    clear(tmp_path)
    assert names_in(tmp_path) == ["mine.json", "mine.png"]


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"unwritable": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    write_json(path, {"é": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 2}
    assert names_in(tmp_path) == ["report.json"]


@pytest.mark.parametrize("report", ["{}", '{"config": {}}', "[]", "{"])
def test_a_checkpoint_that_says_not_what_it_was_made_of_is_not_resumed_over(report, config):
    llmq.quantize(config)
    (config.output / REPORT).write_text(report)
    before = {path: path.read_bytes() for path in config.output.iterdir()}
    with pytest.raises(RequestError, match="--overwrite"):
        llmq.quantize(replace(config, resume=True))
    assert {path: path.read_bytes() for path in config.output.iterdir()} == before


def test_the_peak_of_memory_is_that_of_all_processes_that_took_part(config, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmq.pipeline.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(config)
    path = config.output / PROGRESS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if "linears" in line)["peak_memory_bytes"] = 10**15
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    llmq.quantize(replace(config, resume=True))
    assert json.loads((config.output / REPORT).read_text())["peak_memory_bytes"] == 10**15
