"""Check the modules of the kernels' benchmark: sessions, results, processes and the table."""

import json
import shutil
from dataclasses import replace

import plot_kernels
import pytest
import torch
from bench import bars, cold, correctness, matmuls, peers, pool, report, steps
from bench.machine import INTERPRETER, Machine, timed
from bench.plan import FULL
from bench.results import KERNELS, Results, kernels_hash
from bench.session import Session, Task
from llmq_kernels import reference
from llmq_kernels.choose import Device, Problem, Tile

from llmq.formats.packing import pack_stream

GPU = Device("NVIDIA H200", 90, 132, 227 << 10)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def session(tmp_path):
    machine = Machine(torch.device("cpu"), GPU, lambda launches, least, replays: [1e-6] * replays, 0, "eager")
    return Session(machine, FULL, Results(tmp_path / "results.jsonl", GPU.name), deadline=float("inf"))


def test_a_task_is_done_once(session):
    done = []
    task = Task("time", ("a", 1), lambda: done.append(1) or {"us": 1.0})
    session.do(task)
    session.do(task)
    assert done == [1]
    assert session.results.of("time")[0]["us"] == 1.0


def test_what_is_not_done_in_time_is_told_and_no_failure(session, tmp_path):
    def late():
        raise TimeoutError("not done in time")

    session.do(Task("compile", ("rule",), late))
    session.deadline = session.started
    session.do(Task("time", ("a",), lambda: pytest.fail("begun"), seconds=1))
    assert session.late == ["compile rule", "time a"]
    assert session.failures == session.notes == session.results.of("time") == []


def test_checks_that_are_not_done_in_time_are_told_and_no_failure(session):
    session.deadline = session.started
    correctness._check_all(session, first=True)
    dtypes = ("bfloat16 True", "bfloat16 False", "float16 True", "float16 False")
    assert session.late == [f"correct 4 128 {dtype}" for dtype in dtypes]
    assert session.failures == session.results.bad() == []


@pytest.mark.parametrize("ours", [True, False])
def test_a_failure_costs_the_exit_code_if_it_is_ours_and_is_tried_again_next_time(session, tmp_path, ours):
    session.do(Task("time", ("a",), lambda: 1 // 0, ours=ours))
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
    session.do(Task("time", ("b",), lambda: pytest.fail("tried")))
    assert any("illegal memory access" in failure for failure in session.failures)


def test_a_step_ends_with_a_row_and_fails_if_something_was_wrong(session, monkeypatch, tmp_path):
    tasks = {"good": [Task("time", ("a",), lambda: {"us": 1.0})], "bad": [Task("time", ("b",), lambda: 1 // 0)]}
    for name, its in tasks.items():
        monkeypatch.setitem(steps.TASKS, name, lambda session, its=its: its)
        assert steps.run(name, session, tmp_path) == (name == "bad")
    rows = session.results.steps()
    assert rows["good"]["late"] == []
    assert "failed" not in rows["good"]
    assert "failed" in rows["bad"]


def test_codes_are_packed_for_humming_as_in_a_checkpoint():
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert torch.equal(peers.words_of(codes), pack_stream(codes, 4))


def test_what_a_peer_cannot_compile_in_time_is_not_timed(session, monkeypatch):
    first, second = (Problem(4, 128, True, "bfloat16", M, 4096, 4096) for M in (1, 16))
    monkeypatch.setattr(pool, "run", lambda function, jobs, *_: [(jobs[0], None)])
    session.machine = replace(session.machine, workers=2)
    session.do(*peers.ahead(session, "humming", [first, second]))
    assert [task.key[3] for task in matmuls.times(session, ["humming"], [first, second])] == [1]


def test_rows_count_for_the_same_gpu_versions_and_kernels_only(session, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    session.results.add("time", ("llmq",), {"us": 1.0})
    session.results.add("time", ("cublas",), {"us": 2.0}, ours=False)
    assert Results(path, GPU.name).has("time", ("llmq",))
    assert not Results(path, "NVIDIA A100").has("time", ("cublas",))
    monkeypatch.setattr("bench.results.kernels_hash", lambda: "other kernels")
    changed = Results(path, GPU.name)
    assert changed.has("time", ("cublas",))
    assert not changed.has("time", ("llmq",))


@pytest.mark.parametrize("found", [{"wrong": ["error 0.1"]}, {"failed": "no time left"}])
def test_what_was_found_wrong_is_looked_at_again_even_if_it_was_right_before(session, tmp_path, found):
    for row in ({"wrong": []}, found):
        session.results.add("correct", (4, 32, "float16"), row)
    assert not Results(tmp_path / "results.jsonl", GPU.name).has("correct", (4, 32, "float16"))


@pytest.mark.parametrize("path", ["llmq", "dequantize", "cublas_fp16"])
def test_the_time_of_a_wrong_result_is_not_kept(session, monkeypatch, path):
    monkeypatch.setattr(peers, "multiply", lambda x, weight, *_: 1.01 * reference.matmul(x.float(), weight).half())
    session.plan = replace(FULL, rotation=1)
    session.do(*matmuls.times(session, [path], [Problem(4, 64, True, "float16", 1, 48, 128)]))
    assert len(session.results.of("time")) == (path == "cublas_fp16")
    assert len(session.failures) == (path != "cublas_fp16")


def test_a_line_half_written_is_lost_alone(session, tmp_path):
    path = tmp_path / "results.jsonl"
    session.results.add("time", ("a",), {"us": 1.0})
    with path.open("a") as file:
        file.write('{"kind": "time", "key": ["half a li')
    for name in "bc":
        Results(path, GPU.name).add("time", (name,), {"us": 1.0})
    assert [key for _, key in Results(path, GPU.name)._rows] == ["a", "b", "c"]
    assert [row["key"] for row in plot_kernels.load(path, toy=False)] == [["a"], ["b"], ["c"]]


def test_the_latest_setting_is_plotted_without_what_failed(tmp_path, monkeypatch):
    for kernels in ("old", "new"):
        monkeypatch.setattr("bench.results.kernels_hash", lambda kernels=kernels: kernels)
        results = Results(tmp_path / "results.jsonl", GPU.name)
        results.add("time", ("llmq", kernels), {"us": 1.0})
        results.add("time", ("cublas", kernels), {"us": 2.0}, ours=False)
        results.add("time", ("dequantize",), {"failed": "error 0.1"})
    rows = plot_kernels.load(tmp_path / "results.jsonl", toy=False)
    assert [row["key"] for row in rows] == [["cublas", "old"], ["llmq", "new"], ["cublas", "new"]]
    Results(tmp_path / "results.jsonl", INTERPRETER).add("time", ("llmq",), {"us": 1.0})
    with pytest.raises(ValueError, match="a toy run"):
        plot_kernels.load(tmp_path / "results.jsonl", toy=False)


@pytest.mark.parametrize(("name", "counts"), [("tune.py", True), ("trial.py", True), ("cpu_int4.py", False)])
def test_rows_are_of_other_kernels_if_a_file_changed_that_counts(tmp_path, name, counts):
    shutil.copytree(KERNELS, tmp_path / "kernels")
    before = kernels_hash(tmp_path / "kernels")
    with (tmp_path / "kernels" / name).open("a") as file:
        file.write("# other candidates, say")
    assert (kernels_hash(tmp_path / "kernels") != before) == counts


# ---- processes ----------------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_an_outcome_among_others():
    outcomes = dict(pool.run(int, ["1", "x", "3"], 0, 60))
    assert (outcomes["1"], outcomes["3"]) == (1, 3)
    assert isinstance(outcomes["x"], ValueError)
    assert isinstance(dict(pool.run(int, ["1"], 0, -1))["1"], TimeoutError)


def test_processes_inherit_what_takes_long_to_import_and_one_that_dies_costs_its_own_job():
    imported = "[name in __import__('sys').modules for name in ('torch', 'triton', 'bench.cold', 'bench.correctness')]"
    jobs = [imported, "__import__('os')._exit(3)", "1 // 0", "4"]
    outcomes = dict(pool.run(eval, jobs, 2, 120))
    assert outcomes[imported] == [True] * 4
    assert [type(outcomes[job]) for job in jobs[1:]] == [ChildProcessError, ZeroDivisionError, int]


def test_a_process_that_hangs_is_ended_with_the_time():
    hangs = "__import__('time').sleep(600) or __import__('os').getpid()"
    assert [type(outcome) for _, outcome in pool.run(eval, [hangs, "1"], 1, 2)] == [TimeoutError, TimeoutError]


def test_what_gives_the_same_binary_is_compiled_once():
    problem, tile = Problem(4, 128, True, "bfloat16", 1, 4096, 4096), Tile(8, 64, 4, 3, splits=8)
    same = [(problem, tile), (replace(problem, K=11008), replace(tile, splits=3)), (replace(problem, M=3), tile)]
    assert cold._once_each(same) == same[:1]
    other = [(replace(problem, K=4096 + 128), tile), (problem, replace(tile, splits=1)), (problem, None)]
    other += [(replace(problem, N=4100), tile), (problem, replace(tile, pdl=True))]
    assert cold._once_each([*same, *other]) == [same[0], *other]


def test_everything_is_timed_twice_and_the_spread_is_told():
    passes = iter([[1e-6, 2e-6, 3e-6], [5e-6, 6e-6, 7e-6]])
    machine = Machine(torch.device("cpu"), GPU, lambda *_: next(passes), 0, "eager")
    timing = timed(machine, [], 1e-6, 3)
    assert timing == {"us": 4.0, "p10": 1.0, "p90": 7.0, "twice": [2.0, 6.0], "samples": 6}


# ---- the table ----------------------------------------------------------------------------------------------------


def test_the_table_holds_our_times_against_the_bars_and_the_peers(session):
    session.results.add("ceiling", ("read",), {"us": 1.0, "rate": 4e12}, ours=False)
    tile = {"BM": 8, "BN": 64, "warps": 4, "stages": 3, "splits": 8, "chunk": 64, "fold": False, "pdl": True}
    us = {"rule": 4.0, "cublas_bf16": 9.0, "tinygemm": 5.0, "gemlite": 7.0, "gemlite_h100": 6.0}
    for shape in FULL.shapes[:2]:
        for path, time in us.items():
            row = {"us": time, "twice": [time, time], "bytes": 8e6, "tile": tile}
            session.results.add("time", (path, 4, "bfloat16", 1, *shape), row, ours=path == "rule")
    lines = list(report.lines(session.results, FULL))
    (first, second) = (line for line in lines if line.startswith("    1     4.00"))
    assert first.split()[2:8] == ["0.0%", "0.50", "2.25", "-", "1.25", "-"]
    assert "64x8w4s3c64p/8  must (2.2/3)  of R must (0.47/0.65)" in first
    assert "BELOW (2.7/3.2)" in second
    (means,) = (line for line in lines if "tinygemm 1.25" in line)
    assert "cublas_bf16 2.25 (2 shapes)" in means
    assert "tinygemm 1.25 (2 shapes)  BELOW (1.3/1.45)" in means
    assert "gemlite 1.50 (2 shapes)  BELOW (1.6/2)" in means


def test_a_reason_to_skip_tiles_is_told_with_a_tile_that_was_skipped_for_it():
    tile = {"BM": 8, "BN": 64, "warps": 4, "stages": 3, "splits": 8, "chunk": 64, "fold": False, "pdl": False}
    skipped = [{"tile": tile | {"stages": stages}, "why": f"OSError: {stages}"} for stages in (3, 4, 4)]
    lines = list(report._tuned([{"rule_us": 2.0, "us": 1.0, "skipped": skipped}]))
    assert lines[1:] == [
        "tuning: 1 tiles skipped, for example 64x8w4s3c64/8: OSError: 3",
        "tuning: 2 tiles skipped, for example 64x8w4s4c64/8: OSError: 4",
    ]


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
