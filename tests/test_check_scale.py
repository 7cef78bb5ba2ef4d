"""The script that decides whether the documented memory, resume and speed hold decides rightly."""

import json
import shlex
import sys

import check_scale
import pytest
import tyro
from check_scale import ScaleConfig, check, claims, disk_speed, measured
from commands import ENVIRONMENT
from forked import forking
from interruptions import STOPS
from make_model import MakeConfig, make_model
from soak import SoakConfig, quantization

from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError, WorkError

GOOD = {
    "rtn-7b": {"peak_bytes": 2.0e9, "seconds": 230.0, "disk_seconds": 100.0, "early_bytes": 1000, "late_bytes": 1029},
    "gptq-7b": {"peak_bytes": 3.5e9},
    "flat": {"early_bytes": 1000, "late_bytes": 1029},
    "two-processes": {"one_seconds": [100.0, 90.0, 500.0], "two_seconds": [109.0, 80.0, 900.0], "differing": []},
    "kills": {"identical": 20, "cases": 20},
    "interruptions": {"wrong": {how: [] for how in STOPS}},
    "dead-rank": {"wrong": {"the death of process 0": [], "the death of process 1": []}, "seconds": [3.0, 59.0]},
}


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    with forking():
        yield


def with_rows(path, **changed):
    """All measurements, as if made."""
    rows = {name: row | changed.get(name.replace("-", "_"), {}) for name, row in GOOD.items()}
    path.write_text("".join(json.dumps({"measurement": name} | row) + "\n" for name, row in rows.items()))
    return ScaleConfig(results=path)


def test_every_command_is_one_that_the_programs_take():
    for flags in (check_scale._RTN, check_scale._GPTQ, check_scale._DEMO, check_scale.SMALL):
        tyro.cli(QuantizeConfig, args=["--model", "m", "--output", "o", *shlex.split(flags)])
    assert tyro.cli(SoakConfig, args=shlex.split(check_scale._KILLS)).times == 20
    assert list(GOOD) == list(check_scale._MEASUREMENTS)


def test_measurements_that_satisfy_every_claim_pass(tmp_path, capsys):
    check(with_rows(tmp_path / "rows"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert all(line.startswith("holds ") for line in lines)
    assert "holds     2.000 <= 2.5      GB of memory, 7B, rtn: python -m llmq.quantize --model model-7b" in lines[0]
    assert "holds     1.090 <= 1.1 " in lines[6]


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"rtn_7b": {"peak_bytes": 2.6e9}}, "GB of memory, 7B, rtn"),
        ({"rtn_7b": {"seconds": 241.0}}, "seconds (100 for the disk alone)"),
        ({"rtn_7b": {"late_bytes": 1040}}, "memory in block 30"),
        ({"gptq_7b": {"peak_bytes": 4.1e9}}, "GB of memory, 7B, gptq"),
        ({"flat": {"late_bytes": 1040}}, "memory in block 30 / in block 3 of the demo"),
        ({"two_processes": {"differing": ["model.safetensors"]}}, "files that two processes write otherwise"),
        ({"two_processes": {"one_seconds": [90.0, 90.0, 500.0]}}, "seconds, two processes / one"),
        ({"kills": {"identical": 19}}, "of 20 killed runs"),
        ({"interruptions": {"wrong": {"Ctrl-C": ["exits with 0"]}}}, "a run that ends by Ctrl-C; exits with 0"),
        ({"dead_rank": {"seconds": [3.0, float("inf")]}}, "seconds until all processes have ended"),
    ],
)
def test_a_claim_that_does_not_hold_is_named_and_is_an_error(changed, claim, tmp_path, capsys):
    config = with_rows(tmp_path / "rows", **changed)
    with pytest.raises(WorkError, match="1 claims do not hold"):
        check(config)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS"))
    assert claim in line


def test_a_slow_disk_is_no_fault_of_the_program():
    _, (_, seconds, bar, _), _ = claims("rtn-7b", GOOD["rtn-7b"] | {"seconds": 500.0, "disk_seconds": 510.0})
    assert (seconds, bar) == (500.0, 510.0)


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    made = []

    def measure(config, room):
        made.append(room)
        assert room.is_dir()
        return GOOD["flat"]

    monkeypatch.setitem(check_scale._MEASUREMENTS, "flat", measure)
    config = ScaleConfig(results=tmp_path / "rows", only="flat")
    check(config)
    check(config)
    assert len(made) == 1
    assert not made[0].exists()
    (row,) = map(json.loads, config.results.read_text().splitlines())
    assert row.items() >= (GOOD["flat"] | {"measurement": "flat"}).items()
    assert row["date"]
    assert "cores" in row["machine"]
    with pytest.raises(RequestError, match="only"):
        check(ScaleConfig(results=tmp_path / "rows", only="speed"))


def test_memory_is_measured_from_outside_even_where_the_program_resets_its_peak(tmp_path):
    held = "import time; held = bytearray(300_000_000); time.sleep(0.5); del held"
    reset = "open('/proc/self/clear_refs', 'w').write('5'); time.sleep(0.1)"
    output = tmp_path / "out"
    output.mkdir()
    (output / REPORT).write_text(json.dumps({"seconds": {"total": 1.0}, "peak_memory_bytes": 1}))
    row = measured([sys.executable, "-c", f"{held}; {reset}", str(output)])
    assert 300e6 < row["outside_bytes"] == row["peak_bytes"] < 400e6
    assert row["seconds"] > 0.6


def test_a_run_is_measured_and_one_that_fails_is_an_error(llama, tmp_path):
    flags = "--method rtn --group-size 32"
    row = measured(quantization(str(llama), flags, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert row["peak_bytes"] >= max(report["peak_memory_bytes"], row["outside_bytes"]) > 1e8
    assert row["phases"] == report["seconds"]
    assert row["seconds"] > report["seconds"]["total"]
    with pytest.raises(WorkError, match=r"failed: error: output .* is not empty"):
        measured(quantization(str(llama), flags, tmp_path / "out"))


def test_memory_of_a_block_is_the_most_in_any_of_its_groups(tmp_path, monkeypatch):
    def pretend(words):
        lines = [{"fingerprint": {}}, {"finished": "outside the blocks", "parts": 1}]
        for block, peak in ((2, 10), (2, 30), (2, 20), (28, 90), (29, 31), (29, 5)):
            lines.append({"block": f"model.layers.{block}", "peak_memory_bytes": peak})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / PROGRESS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"peak_bytes": 90}

    monkeypatch.setattr(check_scale, "measured", pretend)
    assert check_scale._flat(ScaleConfig(), tmp_path) == {"peak_bytes": 90, "early_bytes": 30, "late_bytes": 31}


def test_two_processes_take_turns_with_one(tmp_path, monkeypatch):
    order = []

    def pretend(words):
        output = check_scale.Path(words[-1])
        order.append(2 if "torch.distributed.run" in words else 1)
        output.mkdir()
        (output / "model.safetensors").write_text("other" if len(order) == 4 else "same")

    monkeypatch.setattr(check_scale, "finish", pretend)
    monkeypatch.setattr(check_scale.time, "perf_counter", iter([0, 1, 10, 12, 20, 23, 30, 34, 40, 45, 50, 56]).__next__)
    row = check_scale._two_processes(ScaleConfig(), tmp_path)
    assert order == [1, 2, 1, 2, 1, 2]
    assert row == {"one_seconds": [1, 3, 5], "two_seconds": [2, 4, 6], "differing": ["model.safetensors"]}


def test_the_soak_is_asked_for_its_count(text_file, tmp_path, monkeypatch):
    make_model(MakeConfig(tmp_path / "model", shape="tiny"))
    flags = f"--calibration {text_file} --samples 4 --sequence-length 64"
    words = ["--times", "1", "--model", str(tmp_path / "model"), f"--flags={flags}"]
    monkeypatch.setattr(check_scale, "_KILLS", shlex.join(words))
    assert check_scale._kills(ScaleConfig(directory=tmp_path), tmp_path) == {"identical": 1, "cases": 1}
    monkeypatch.setattr(check_scale, "_KILLS", "--times few")
    with pytest.raises(WorkError, match="failed"):
        check_scale._kills(ScaleConfig(directory=tmp_path), tmp_path)


def test_the_disk_is_tried_and_cleaned(tmp_path, monkeypatch):
    monkeypatch.setattr(check_scale, "_DISK_TRIAL", 1 << 24)
    assert all(1e5 < speed < 1e12 for speed in disk_speed(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_small_model_is_made_for_interruptions(tmp_path, monkeypatch):
    """The checks themselves are tested in test_soak.py."""
    monkeypatch.setattr(check_scale, "interrupted", lambda words, how, expected: [how, words[-1], *expected])
    monkeypatch.setattr(
        check_scale, "dead_process", lambda words, rank, _: (rank + 1.0, [str("--standalone" in words)])
    )
    monkeypatch.setattr(
        check_scale, "finish", lambda words: make_model(MakeConfig(check_scale.Path(words[-1]), "tiny"))
    )
    rows = check_scale._interruptions(ScaleConfig(), tmp_path)["wrong"]
    assert list(rows) == list(STOPS)
    assert len({wrong[1] for wrong in rows.values()}) == 4
    assert all("model.safetensors" in wrong for wrong in rows.values())
    (tmp_path / "other").mkdir()
    row = check_scale._dead_rank(ScaleConfig(), tmp_path / "other")
    assert row["seconds"] == [1.0, 2.0]
    assert list(row["wrong"].values()) == [["True"], ["True"]]
