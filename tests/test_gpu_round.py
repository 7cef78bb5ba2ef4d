"""Check that the GPU round runs from end to end in Triton's interpreter, and that no step can hurt another one."""

import json
import os
import subprocess
import sys
import zipfile

import gpu_round
import pytest
import torch
from bench.machine import the_machine
from bench.plan import TOY
from bench.results import Results
from bench.round import ROOT, STEPS, Round, Step
from commands import run_here
from llmq_kernels.choose import table_name

pytestmark = pytest.mark.together
GPU = "NVIDIA H200"


def run_toy(*arguments):
    """Make a toy run from the root, without llmq being installed; returns what it printed."""
    command = [sys.executable, "scripts/gpu_round.py", "--toy", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Make a toy run. Returns (folder, stdout)."""
    folder = tmp_path_factory.mktemp("round")
    return folder, run_toy("--out", folder)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "round.jsonl").read_text().splitlines()]


def test_a_toy_run_does_every_step_and_says_that_it_measures_nothing(toy):
    folder, printed = toy
    rows = rows_of(folder)
    assert [row["key"][0] for row in rows if row["kind"] == "step"] == ["machine", *(step.name for step in STEPS)]
    assert not any("failed" in row or row.get("wrong") or row.get("late") for row in rows)
    assert {row["device"] for row in rows} == {"interpreter"}
    assert "A TOY RUN" in printed.splitlines()[0]
    assert {row["key"][0] for row in rows if row["kind"] == "ceiling"} == {"read", "copy", "matmul", "interval"}
    paths = {"llmq", "rule", "dequantize", "cublas_bf16", "cublas_fp16", "tinygemm"}
    assert {row["path"] for row in rows if row["kind"] == "time"} == paths
    assert {tuple(row["key"][:2]) for row in rows if row["kind"] == "decode"} == {
        (kind, how) for kind in ("packed", "dense") for how in ("eager", "compiled", "ungraphed")
    }


def test_what_comes_back_is_a_few_files_and_a_table_that_is_printed_last(toy):
    folder, printed = toy
    assert {path.name for path in folder.iterdir()} == {
        "round.jsonl",
        "round.md",
        "round.log",
        table_name("interpreter"),
    }
    assert len(printed.splitlines()) <= 45
    log = (folder / "round.log").read_text()
    assert all(f"===== {step.name}: " in log for step in STEPS)


def test_results_of_all_paths_are_compared_with_float64(toy):
    rows = rows_of(toy[0])
    assert all(0 < row["error"] < 0.02 for row in rows if row["kind"] == "time")
    assert all(row["error"] < 3e-4 for row in rows if row["kind"] == "time" and row["path"] == "rule" and row["M"] == 1)
    checked = [row for row in rows if row["kind"] == "correct"]
    grid = TOY.grid
    assert len(checked) == 2 * len(grid.bits) * len(grid.groups) * len(grid.dtypes)
    assert all(row["cases"] == len(grid.tokens) + 1 and row["wrong"] == [] for row in checked)
    assert all(row["twin_equal"] == row["twins"] == 1 for row in checked)
    order = [(row["kind"], row.get("path")) for row in rows]
    assert order.index(("correct", None)) < order.index(("time", "rule"))


def test_the_tuned_tiles_are_a_table_and_the_ones_that_are_timed(toy):
    table = json.loads((toy[0] / table_name("interpreter")).read_text())
    assert table["gpu"] == "interpreter"
    tuned = {(row["bits"], row["M"], row["N"], row["K"]): row["tile"] for row in table["rows"]}
    timed_rows = [row for row in rows_of(toy[0]) if row["kind"] == "time" and row["path"] == "llmq"]
    assert len(timed_rows) == 3
    for row in timed_rows:
        assert row["tile"] == tuned[row["bits"], 8 if row["M"] == 1 else row["M"], row["N"], row["K"]]


def test_models_are_loaded_continued_and_quantized(toy):
    rows = {tuple(row["key"]): row for row in rows_of(toy[0]) if row["kind"] in ("generate", "quantize")}
    for what, loop in (("packed", "generate"), ("merged", "generate"), ("merged", "fast"), ("dense", "fast")):
        assert len(rows[what, loop]["ids"]) == TOY.generation.prompt + TOY.generation.new
    # The same checkpoint gives the same tokens, in any loop.
    assert rows["packed", "generate"]["ids"] == rows["merged", "generate"]["ids"] == rows["merged", "fast"]["ids"]
    assert rows["merged", "fast"]["plain"] is rows["dense", "fast"]["plain"] is None
    q = TOY.quantizing
    quantized = rows[q.blocks, q.samples, q.length]
    assert len(quantized["errors"]) == 4 * q.blocks
    assert all(0 < error < 0.5 for error in quantized["errors"])
    assert len(quantized["blocks"]) == q.blocks - 1


def test_a_later_call_measures_nothing_again_and_prints_the_same_table(toy, tmp_path):
    folder, printed = toy
    again = run_toy("--out", tmp_path, "--resume-from", folder / "round.jsonl")
    before, after = rows_of(folder), rows_of(tmp_path)
    assert after[: len(before)] == before
    assert [row["key"] for row in after[len(before) :]] == [["machine"]]
    assert again == printed


def test_the_results_are_plotted_only_if_one_insists_on_plotting_toys(toy, tmp_path):
    pytest.importorskip("matplotlib")
    results = toy[0] / "round.jsonl"
    refused = run_here("plot_kernels", "--results", results, "--output", tmp_path / "no")
    assert refused.returncode == 2
    assert "nothing in it is a measurement" in refused.stderr
    assert not (tmp_path / "no").exists()
    plotted = run_here("plot_kernels", "--results", results, "--output", tmp_path / "plots", "--toy")
    assert plotted.returncode == 0, plotted.stderr
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


# ---- one step and the others --------------------------------------------------------------------------------------


@pytest.fixture
def a_round(tmp_path, monkeypatch):
    """A round on a GPU that is only said to be there, whose steps run the code that a test gives them."""
    round_ = Round(tmp_path, os.environ | {"PYTHONPATH": ""}, toy=False)
    said = (
        f"from pathlib import Path; from bench.results import Results; Results(Path({str(round_.results)!r}), {GPU!r})"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    round_.environment["PYTHONPATH"] = str(ROOT / "scripts")
    code = {"machine": f"{said}.add('machine', (), {{}}, ours=False)"}
    code |= {step.name: f"{said}.add('step', ({step.name!r},), dict(seconds=1, late=[], notes=[]))" for step in STEPS}
    monkeypatch.setattr(Round, "command", lambda self, step, seconds: [sys.executable, "-c", code[step.name]])
    monkeypatch.setattr("bench.round._GRACE", 0)
    monkeypatch.setattr("gpu_round.STEPS", tuple(Step(step.name, 1.5, least=0) for step in STEPS))
    return round_, code


def call(round_, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_round.py", *arguments])
        return gpu_round.run(round_, gpu_round.arguments(), gpu_round.time.perf_counter())


def test_a_step_that_hangs_or_breaks_costs_itself_alone_and_is_run_again(a_round):
    round_, code = a_round
    good = dict(code)
    code |= {"smoke": "import time; time.sleep(600)", "speed": "raise OSError('no kernel image')"}
    steps = call(round_).steps()
    assert steps["smoke"]["late"] == ["stopped by its limit"]
    assert "failed" not in steps["smoke"]
    assert steps["speed"]["failed"] == "OSError: no kernel image"
    others = steps.keys() - {"smoke", "speed"}
    assert others == {step.name for step in STEPS} - {"smoke", "speed"}
    assert all(steps[name]["seconds"] == 1 for name in others)
    code |= dict.fromkeys(others, "raise SystemExit('run again')") | {name: good[name] for name in ("smoke", "speed")}
    code["machine"] = good["machine"]
    assert not any("failed" in row or row["late"] for row in call(round_).steps().values())


def test_what_does_not_fit_into_the_time_is_told_and_no_failure(a_round, monkeypatch):
    round_, _ = a_round
    monkeypatch.setattr("gpu_round.STEPS", STEPS)
    results = call(round_, "--seconds", "20")  # quantize and tune need 30
    late = {name for name, row in results.steps().items() if row["late"] == ["not begun"]}
    assert {"quantize", "tune"} <= late
    assert results.bad() == []
    assert any("quantize" in line and "not begun" in line for line in gpu_round.endings(results))


def test_without_a_gpu_it_says_what_to_do_and_exits_with_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_round.py", "--out", str(tmp_path)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_round.main() == 2
    assert "--toy tries the script without a GPU" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        the_machine(toy=True)


PYTEST = """
tests/a.py::one[x y] PASSED          [ 10%]
[gw3] [ 20%] PASSED tests/a.py::two
[gw1] [ 30%] FAILED tests/b.py::three[Tile(BM=8)]
"""


def test_a_stopped_pytest_tells_what_passed_until_then(a_round, monkeypatch):
    round_, _ = a_round
    printing = f"import time; print({PYTEST!r}, flush=True); time.sleep(600)"
    monkeypatch.setattr(Round, "command", lambda *_: [sys.executable, "-c", printing])
    round_.run(Step("tests", 2, ("-m", "gpu")), 2, GPU)
    row = Results(round_.results, GPU).steps()["tests"]
    assert (row["passed"], row["late"]) == (2, ["stopped by its limit"])
    assert row["failed"].startswith("1 tests")


def test_a_failed_test_is_named(a_round, monkeypatch):
    round_, _ = a_round
    said = PYTEST + "FAILED tests/b.py::three[Tile(BM=8)] - assert 1 == 2\n"
    monkeypatch.setattr(Round, "command", lambda *_: [sys.executable, "-c", f"print({said!r}); exit(1)"])
    round_.run(Step("tests", 9, ("-m", "gpu")), 9, GPU)
    assert "three[Tile(BM=8)] - assert 1 == 2" in Results(round_.results, GPU).steps()["tests"]["failed"]


def test_wheels_are_found_by_the_steps(tmp_path):
    wheel = tmp_path / "carried-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("carried.py", "print('carried along')")
        about = {"METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n"}
        about |= {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "RECORD": ""}
        for name, text in about.items():
            file.writestr(f"carried-1.0.dist-info/{name}", text)
    gpu_round.install(tmp_path, tmp_path / "site")
    environment = gpu_round.environment(tmp_path / "site", tmp_path, toy=False)
    code = "import carried, llmq, llmq_kernels, bench"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("carried along\n", "")
