"""The benchmark of the kernels runs from end to end in Triton's interpreter, and notices what it is there to notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_kernels
import pytest
import torch
from bench import bars, correctness, pool, report
from bench.machine import Machine, the_machine, timed
from bench.plan import FULL, TOY
from bench.results import Results
from bench.session import Session, Task
from llmq_kernels import dequantize_matmul, reference
from llmq_kernels.choose import Device

ROOT = Path(__file__).parent.parent
GPU = Device("NVIDIA H200", 90, 132, 227 << 10)


def script(name, *arguments, code=0):
    """Run scripts/NAME.py in the interpreter; returns (stdout, stderr)."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(results, table, stdout) of a toy run."""
    folder = tmp_path_factory.mktemp("bench")
    results, table = folder / "new" / "toy.jsonl", folder / "table.json"
    return results, table, script("bench_kernels", "--toy", "--results", results, "--table", table)[0]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_toy_run_does_every_step_and_says_that_it_measures_nothing(toy):
    results, _, printed = toy
    rows = rows_of(results)
    assert {row["kind"] for row in rows} == set(bench_kernels.STEPS)
    assert {row["device"] for row in rows} == {"interpreter"}
    assert not any("failed" in row for row in rows)
    assert "A TOY RUN" in printed.splitlines()[0]
    assert {row["key"][0] for row in rows if row["kind"] == "ceiling"} == {"read", "copy", "matmul", "interval"}
    assert {row["path"] for row in rows if row["kind"] == "time"} == {
        *("llmq", "dequantize", "cublas_bf16", "cublas_fp16", "tinygemm")
    }
    assert {tuple(row["key"][:2]) for row in rows if row["kind"] == "decode"} == {
        (kind, how) for kind in ("packed", "dense") for how in ("eager", "compiled")
    }


def test_results_of_all_paths_are_compared_with_float64(toy):
    rows = rows_of(toy[0])
    assert all(0 < row["error"] < 0.02 for row in rows if row["kind"] == "time")
    assert all(row["error"] < 3e-4 for row in rows if row["kind"] == "time" and row["path"] == "llmq" and row["M"] == 1)
    checked = [row for row in rows if row["kind"] == "correct"]
    grid = TOY.grid
    assert len(checked) == len(grid.bits) * len(grid.groups) * len(grid.dtypes)
    assert all(row["cases"] == 2 * (len(grid.tokens) + 1) and row["wrong"] == [] for row in checked)
    assert all(row["twin_equal"] == row["twins"] == 2 for row in checked)


def test_the_tuned_tiles_are_a_table_and_the_ones_that_are_timed(toy):
    results, table, _ = toy
    tuned = {(row["bits"], row["M"], row["N"], row["K"]): row["tile"] for row in json.loads(table.read_text())["rows"]}
    timed_rows = [row for row in rows_of(results) if row["kind"] == "time" and row["path"] == "llmq"]
    assert len(timed_rows) == 3
    for row in timed_rows:
        assert row["tile"] == tuned[row["bits"], 8 if row["M"] == 1 else row["M"], row["N"], row["K"]]


def test_a_second_call_measures_nothing_again_and_prints_the_same_table(toy):
    results, _, printed = toy
    before = results.read_text()
    again, _ = script("bench_kernels", "--toy", "--results", results)
    assert results.read_text() == before
    numbers = [line for line in printed.splitlines() if not line.startswith("note")]
    assert numbers == [line for line in again.splitlines() if not line.startswith("note")]


def test_the_results_are_plotted_only_if_one_insists_on_plotting_toys(toy, tmp_path):
    pytest.importorskip("matplotlib")
    _, said = script("plot_kernels", "--results", toy[0], "--output", tmp_path / "no", code=2)
    assert "nothing in it is a measurement" in said
    assert not (tmp_path / "no").exists()
    script("plot_kernels", "--results", toy[0], "--output", tmp_path / "plots", "--toy")
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_what_to_do_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main() == 2
    assert "--toy tries the script out" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        the_machine(toy=True)


# ---- correctness --------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """In place of the kernels: plain torch, into y. A test may spoil the result."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def multiply(x, weight, tile, counters, y):
        y.copy_(reference.matmul(x.float(), weight))
        multiply.spoil(y, counters)
        return y

    def dequantize_rows(weight, W, first_row):
        W.copy_(reference.dequantize(weight, torch.float32)[first_row : first_row + len(W)])

    multiply.spoil = lambda y, counters: None
    monkeypatch.setattr(correctness, "multiply", multiply)
    monkeypatch.setattr(dequantize_matmul, "dequantize_rows", dequantize_rows)
    return multiply


JOB = correctness.Job(True, 4, 32, "float16")


def test_right_results_pass(kernels):
    row = correctness.check(JOB)
    assert row["wrong"] == row["skipped"] == []
    assert row["cases"] == 4
    assert 1e-5 < row["error"] < 3e-4


def fails_sometimes(y, counters):
    y[0, 0] += 0.01 * next(CALLS)


CALLS = iter(range(10**6))
SPOILED = {
    "one_number": (lambda y, counters: y[0, -1].add_(1), "error"),
    "unwritten": (lambda y, counters: y[-1, -1].fill_(float("nan")), "error nan"),
    "a_percent": (lambda y, counters: y.mul_(1.01), "error 9.9"),
    "changing": (fails_sometimes, "runs differ"),
    "counters": (lambda y, counters: counters[3].add_(1), "counters are not zero"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED)
def test_a_wrong_result_is_found(kernels, spoil, said):
    kernels.spoil = spoil
    wrong = correctness.check(JOB)["wrong"]
    assert len(wrong) >= 4
    assert said in wrong[0]


def test_a_kernel_that_cannot_run_is_wrong_and_the_rest_is_checked(kernels):
    def spoil(y, counters):
        if len(y.T) == TOY.grid.outputs:
            raise OSError("illegal memory access")

    kernels.spoil = spoil
    row = correctness.check(JOB)
    assert all("illegal memory access" in what for what in row["wrong"])
    assert len(row["wrong"]) == 4  # symmetric and not, the product and its twin
    assert row["cases"] == 2


# ---- the session --------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path):
    machine = Machine(torch.device("cpu"), GPU, lambda launches, least, replays: [1e-6] * replays, 0, "eager")
    return Session(machine, FULL, Results(tmp_path / "results.jsonl", GPU.name), deadline=float("inf"))


def test_a_task_is_done_once(session):
    done = []
    task = Task("time", ("a", 1), lambda: done.append(1) or {"us": 1.0})
    assert session.do(task)
    assert session.do(task)
    assert done == [1]
    assert session.results.of("time")[0]["us"] == 1.0


def test_a_task_that_would_not_end_in_time_is_not_begun(session):
    session.deadline = session.started
    assert not session.do(Task("time", ("a",), lambda: pytest.fail("begun"), seconds=1))
    assert session.results.of("time") == []


@pytest.mark.parametrize("ours", [True, False])
def test_a_failure_costs_the_exit_code_if_it_is_ours_and_is_tried_again_next_time(session, tmp_path, ours):
    assert session.do(Task("time", ("a",), lambda: 1 // 0, ours=ours))
    assert bool(session.failures) == ours
    assert bool(session.notes) != ours
    (row,) = rows_of(tmp_path / "results.jsonl")
    assert "ZeroDivisionError" in row["failed"]
    assert not Results(tmp_path / "results.jsonl", GPU.name).has("time", ("a",))


def test_after_the_gpu_is_lost_nothing_is_tried(session, monkeypatch):
    def lost(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Machine, "synchronize", lost)
    session.do(Task("time", ("a",), lambda: 1 // 0))
    assert session.do(Task("time", ("b",), lambda: pytest.fail("tried")))
    assert any("illegal memory access" in failure for failure in session.failures)


def test_the_exit_code_is_1_when_something_was_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--toy", "--results", str(tmp_path / "results.jsonl")])
    monkeypatch.setattr(bench_kernels, "schedule", lambda session: [Task("time", ("a",), lambda: 1 // 0)])
    assert bench_kernels.main() == 1


def test_rows_count_for_the_same_gpu_versions_and_kernels_only(session, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    session.results.add("time", ("llmq",), {"us": 1.0})
    session.results.add("time", ("cublas",), {"us": 2.0}, ours=False)
    with path.open("a") as file:
        file.write('{"kind": "time", "key": ["half a li')
    assert Results(path, GPU.name).has("time", ("llmq",))
    assert not Results(path, GPU.name, again=("time",)).has("time", ("cublas",))
    assert not Results(path, "NVIDIA A100").has("time", ("cublas",))
    monkeypatch.setattr("bench.results.kernels_hash", lambda: "other kernels")
    changed = Results(path, GPU.name)
    assert changed.has("time", ("cublas",))
    assert not changed.has("time", ("llmq",))


def test_a_job_that_fails_is_an_outcome_among_others():
    outcomes = dict(pool.run(int, ["1", "x", "3"], 0, 60))
    assert (outcomes["1"], outcomes["3"]) == (1, 3)
    assert isinstance(outcomes["x"], ValueError)
    assert isinstance(dict(pool.run(int, ["1"], 0, -1))["1"], TimeoutError)


def test_everything_is_timed_twice_and_the_spread_is_told():
    passes = iter([[1e-6, 2e-6, 3e-6], [5e-6, 6e-6, 7e-6]])
    machine = Machine(torch.device("cpu"), GPU, lambda *_: next(passes), 0, "eager")
    timing = timed(machine, [], 1e-6, 3)
    assert timing == {"us": 4.0, "p10": 1.0, "p90": 7.0, "twice": [2.0, 6.0], "samples": 6}


# ---- the table ----------------------------------------------------------------------------------------------------


def test_the_table_holds_our_times_against_the_bars_and_the_peers(session):
    session.results.add("ceiling", ("read",), {"us": 1.0, "rate": 4e12}, ours=False)
    tile = {"BM": 8, "BN": 64, "warps": 4, "stages": 3, "splits": 8, "chunk": 64, "fold": False, "pdl": True}
    us = {"llmq": 4.0, "cublas_bf16": 9.0, "tinygemm": 5.0, "gemlite": 7.0, "gemlite_h100": 6.0}
    for shape in FULL.shapes[:2]:
        for path, time in us.items():
            row = {"us": time, "twice": [time, time], "bytes": 8e6, "tile": tile}
            session.results.add("time", (path, 4, "bfloat16", 1, *shape), row, ours=path == "llmq")
    lines = list(report.table(session))
    (first, second) = (line for line in lines if line.startswith("    1     4.00"))
    assert first.split()[2:8] == ["0.0%", "0.50", "2.25", "-", "1.25", "1.50"]
    assert "64x8w4s3c64p/8  must (2.2/3)  of R must (0.47/0.65)" in first
    assert "BELOW (2.7/3.2)" in second
    (means,) = (line for line in lines if "tinygemm 1.25" in line)
    assert "cublas_bf16 2.25 (2 shapes)" in means
    assert "tinygemm 1.25 (2 shapes)  BELOW (1.3/1.45)" in means
    assert "gemlite 1.50 (2 shapes)  BELOW (1.6/2)" in means


def test_every_bar_is_for_something_that_is_measured():
    tokens = {*FULL.first, *FULL.later}
    assert set(bars.FRACTION) == set(FULL.shapes)
    assert set(bars.SPEEDUP) <= tokens
    assert all(set(row) == set(FULL.shapes) for row in bars.SPEEDUP.values())
    assert set(FULL.first) <= set(bars.SPEEDUP)
    assert all(set(row) <= tokens for row in bars.PEERS.values())
    assert set(bars.WIDTHS) == set(FULL.widths)
    every = [bars.FRACTION, *bars.SPEEDUP.values(), *bars.PEERS.values(), bars.WIDTHS]
    assert all(must < stretch for row in every for must, stretch in row.values())
