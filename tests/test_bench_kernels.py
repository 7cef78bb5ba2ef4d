"""Check that the benchmark of the kernels runs from end to end in Triton's interpreter and notices mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_kernels
import pytest
import torch
from bench import correctness
from bench.machine import the_machine
from bench.plan import TOY
from commands import run_here
from llmq_kernels import dequantize_matmul, reference

pytestmark = pytest.mark.together
ROOT = Path(__file__).parent.parent


def benchmark(*arguments):
    """Run scripts/bench_kernels.py in the interpreter, in a process of its own; returns what it printed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_kernels.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Make a toy run. Returns (results, table, stdout)."""
    folder = tmp_path_factory.mktemp("bench")
    results, table = folder / "new" / "toy.jsonl", folder / "table.json"
    return results, table, benchmark("--toy", "--results", results, "--table", table)


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
        (kind, how) for kind in ("packed", "dense") for how in ("eager", "compiled", "ungraphed")
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
    again = benchmark("--toy", "--results", results)
    assert results.read_text() == before
    numbers = [line for line in printed.splitlines() if not line.startswith("note")]
    assert numbers == [line for line in again.splitlines() if not line.startswith("note")]


def test_the_results_are_plotted_only_if_one_insists_on_plotting_toys(toy, tmp_path):
    pytest.importorskip("matplotlib")
    refused = run_here("plot_kernels", "--results", toy[0], "--output", tmp_path / "no")
    assert refused.returncode == 2
    assert "nothing in it is a measurement" in refused.stderr
    assert not (tmp_path / "no").exists()
    plotted = run_here("plot_kernels", "--results", toy[0], "--output", tmp_path / "plots", "--toy")
    assert plotted.returncode == 0, plotted.stderr
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_what_to_do_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main() == 2
    assert "--toy tries the script without a GPU" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        the_machine(toy=True)


# ---- correctness --------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Replace the kernels by plain torch that writes into y. A test may spoil the result."""
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
    "changing": (fails_sometimes, "runs gave different bits"),
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
    assert len(row["wrong"]) == 4  # symmetric and asymmetric, each for the product and its twin
    assert row["cases"] == 2
