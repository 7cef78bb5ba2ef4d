"""Runs that are killed or stopped on their way end in the same bytes, and the script that says so is right."""

import json
import re
import sys
from hashlib import sha256

import interruptions
import pytest
import soak
import tyro
from commands import ENVIRONMENT, run_here
from forked import forking
from interruptions import STOPS, dead_process, interrupted
from make_model import MakeConfig, make_model
from soak import SoakConfig, case, finish, hashes, quantization, resumed

from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.core.config import QuantizeConfig
from llmq.core.errors import WorkError
from llmq.run.journal import read_journal


@pytest.fixture(scope="module", autouse=True)
def _light():
    with pytest.MonkeyPatch.context() as patch, forking():
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, ENVIRONMENT[name])
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_model(MakeConfig(directory, shape="tiny", blocks=4))
    return str(directory)


@pytest.fixture(scope="module")
def flags(text_file):
    """More text than a test needs: the run must still be going on when it is stopped."""
    return f"--calibration {text_file} --samples 64 --sequence-length 128 --group-size 64"


@pytest.fixture(scope="module")
def expected(model, flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    finish(quantization(model, flags, output))
    return hashes(output)


def pretended(output, work):
    """The command of a run that does only this."""
    start = "import os, sys, pathlib; output = pathlib.Path(sys.argv[-1]); output.mkdir(exist_ok=True)\n"
    return [sys.executable, "-c", start + work, "--output", str(output)]


def test_the_flags_are_those_of_quantize():
    args = quantization("m", f"{soak.FLAGS} --samples 4", "o")[3:]
    assert tyro.cli(QuantizeConfig, args=args).samples == 4


def test_killed_cases_end_in_the_same_bytes_and_are_told_line_by_line(model, flags, tmp_path):
    options = ("--model", model, f"--flags={flags}", "--times", "2", "--offload", "--directory", tmp_path)
    done = run_here("soak", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *cases, last = done.stdout.splitlines()
    assert re.fullmatch(r"uninterrupted: +[\d.]+ s, 4 files", first)
    line = r" +\d of 2  (killed after +[\d.]+ s with +\d blocks finished, )+resumed in +[\d.]+ s: same bytes"
    assert len(cases) == 2
    assert all(re.fullmatch(line, each) for each in cases), cases
    assert last == "2 of 2 end byte-identical"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_at_once_and_again_ends_in_the_same_bytes(model, flags, expected, tmp_path):
    told, wrong = case(quantization(model, flags, tmp_path / "out"), [0.0, 0.0], expected)
    assert wrong == []
    assert told.count("with  0 blocks finished") == 2


def test_other_bytes_and_a_result_that_only_looks_finished_are_told(tmp_path):
    words = pretended(tmp_path / "out", "(output / 'config.json').write_text('{}')")
    _, wrong = case(words, [60.0], {"config.json": sha256(b"{}").hexdigest(), "model.safetensors": "…"})
    which = "['model.safetensors']"
    assert wrong == [f"looks finished after kill 1 but differs in {which}", f"ends with other bytes in {which}"]
    _, wrong = case(words, [60.0], {"config.json": sha256(b"{}").hexdigest()})
    assert wrong == []


def test_a_run_that_fails_by_itself_is_told(tmp_path):
    _, wrong = case(pretended(tmp_path / "out", "sys.exit('error: no')"), [60.0], {})
    assert wrong[0] == "exits with 1 before it is killed"
    assert wrong[1].endswith("exits with 1: error: no")


def test_a_case_that_fails_is_an_error_and_is_left_there(tmp_path, monkeypatch, capsys):
    def fail_second(words, moments, expected):
        soak.Path(words[-1]).mkdir()
        return "killed", ["ends with other bytes"] if "case-2" in words[-1] else []

    monkeypatch.setattr(soak, "finish", lambda words: soak.Path(words[-1]).mkdir())
    monkeypatch.setattr(soak, "case", fail_second)
    with pytest.raises(WorkError, match="1 cases fail"):
        soak.soak(SoakConfig(times=3, directory=tmp_path))
    assert "  2 of 3  killed: ends with other bytes\n" in (printed := capsys.readouterr().out)
    assert printed.endswith("2 of 3 end byte-identical\n")
    assert sorted(path.name for path in tmp_path.glob("*/case-*")) == ["case-2"]


def test_moments_depend_on_the_seed_alone_and_spread_over_the_run(tmp_path, monkeypatch):
    drawn = []

    def remember(words, moments, expected):
        drawn.append(moments)
        soak.Path(words[-1]).mkdir()
        return "", []

    monkeypatch.setattr(soak, "finish", lambda words: soak.Path(words[-1]).mkdir())
    monkeypatch.setattr(soak, "case", remember)
    monkeypatch.setattr(soak.time, "perf_counter", iter([0.0, 100.0] * 3).__next__)
    for seed in (0, 0, 1):
        soak.soak(SoakConfig(times=60, seed=seed, directory=tmp_path))
    first, again, other = drawn[:60], drawn[60:120], drawn[120:]
    assert first == again
    assert first != other
    assert all(0 <= sum(moments) <= 100 for moments in drawn)
    assert all(10 <= sum(lowest <= moments[0] < lowest + 25 for moments in first) <= 20 for lowest in (0, 25, 50, 75))
    assert 12 <= sum(len(moments) == 2 for moments in first) <= 28


@pytest.mark.parametrize("how", STOPS)
def test_a_run_that_is_stopped_says_so_in_a_line_and_is_gone_on_with(how, model, flags, expected, tmp_path):
    assert interrupted(quantization(model, flags, tmp_path / "out"), how, expected) == []
    (once,) = json.loads((tmp_path / "out" / REPORT).read_text())["resumed"]
    assert once.startswith("model.layers.")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("os.kill(os.getpid(), 9)", ["exits with -9", "says []"]),
        ("sys.exit('error: a\\nerror: b')", ["says ['error: a', 'error: b']"]),
        ("sys.exit('error: a\\nb\\nc')", ["says ['error: a', 'b', 'c']"]),
        ("sys.exit('Traceback\\nerror: a')", ["says ['Traceback', 'error: a']"]),
        (
            "(output / 'config.json').write_text('{}'); sys.exit('error: a')",
            ["leaves a config.json", "ends with other bytes in ['config.json']"],
        ),
    ],
)
def test_what_a_stopped_run_may_not_do_is_told(end, told, tmp_path, monkeypatch):
    finished = [json.dumps({"finished": f"model.layers.{i}"}) for i in range(2)]
    waits = f"""
output.joinpath({PROGRESS!r}).write_text({chr(10).join(["{}", *finished, ""])!r})
while not (output / 'stop').exists(): pass
if '--resume' not in sys.argv: {end}
"""
    monkeypatch.setitem(STOPS, "it", lambda _, output: (output / "stop").touch())
    assert interrupted(pretended(tmp_path / "out", waits), "it", {"stop": sha256(b"").hexdigest()}) == told


def test_a_run_that_was_over_cannot_be_stopped(tmp_path):
    with pytest.raises(WorkError, match="ended, with 3, before it could be stopped"):
        interrupted(pretended(tmp_path / "out", "sys.exit(3)"), "Ctrl-C", {})


def test_a_process_that_dies_ends_the_others_and_the_run_is_gone_on_with(model, flags, expected, tmp_path, monkeypatch):
    output = tmp_path / "out"
    alone = resumed(quantization(model, flags, output))  # a forked process starts in no time, torchrun's do not
    monkeypatch.setattr(interruptions, "resumed", lambda _: alone)
    seconds, wrong = dead_process(quantization(model, flags, output, 2), 0, expected)  # 1 dies in test_ranks.py
    assert wrong == []
    assert seconds < 60
    assert len(read_journal(output / PROGRESS)[1]) == 1 + 4
