"""The command that tunes: which shapes it finds in a model, what it writes, and what it says without a GPU."""

import json
from dataclasses import asdict

import pytest
import torch
from commands import run_here
from llmq_kernels import choose as choosing
from llmq_kernels import op, trial
from llmq_kernels.choose import Device, Problem, choose, tables_for
from packed import pack
from tiny import save_tiny

from llmq import tune
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Grid
from llmq.models.model_source import ModelSource
from llmq.models.safetensors_files import SafetensorsDirectory
from llmq.runtime import tiles

# (out, in) of the tiny Llama's linears: q and o, k and v, gate and up, down.
SHAPES = [(32, 64), (64, 64), (64, 96), (96, 64)]
H200 = Device("NVIDIA H200", 90, 132, 227 << 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A packed tiny Llama stored in bfloat16."""
    directory = tmp_path_factory.mktemp("tune")
    return pack(save_tiny(directory / "model", dtype=torch.bfloat16), directory / "packed", symmetric=False)


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_1(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here("llmq.tune", "--model", checkpoint)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no CUDA GPU here, so there is nothing to tune")


def test_the_shapes_of_a_packed_checkpoint_are_found_once_each_and_without_its_weights(checkpoint, monkeypatch):
    monkeypatch.setattr(SafetensorsDirectory, "read_all", lambda *_: pytest.fail("weights are read"))
    problems = tiles.packed_problems(Checkpoint(checkpoint))
    assert problems == [Problem(4, 32, False, "bfloat16", 1, N, K) for N, K in SHAPES]


def test_one_group_for_a_whole_row_is_as_long_as_the_row(llama, tmp_path):
    problems = tiles.packed_problems(Checkpoint(pack(llama, tmp_path / "packed", group_size=-1, bits=8)))
    assert [(p.bits, p.group_size, p.symmetric, p.N, p.K) for p in problems] == [(8, K, True, N, K) for N, K in SHAPES]


@pytest.mark.parametrize(("group", "expected"), [(128, 32), (32, 32), (-1, None)])
def test_an_original_model_gives_the_shapes_that_packing_it_would(tmp_path, group, expected):
    model = save_tiny(tmp_path / "model", dtype=torch.float16)
    problems = tiles.original_problems(ModelSource(str(model)), Grid(3, group))
    assert problems == [Problem(3, expected or K, True, "float16", 1, N, K) for N, K in SHAPES]


def test_few_tokens_come_first_for_all_shapes():
    problems = [Problem(4, 32, True, "float16", 1, N, K) for N, K in SHAPES]
    everywhere = tiles.at_all_sizes(problems)
    assert [(p.M, p.N, p.K) for p in everywhere[:5]] == [(1, N, K) for N, K in SHAPES] + [(16, *SHAPES[0])]
    assert max(p.M for p in everywhere) == 256
    assert len(set(everywhere)) == 6 * len(SHAPES)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (Problem(4, 48, True, "float16", 1, 96, 96), "groups of 48"),
        (Problem(4, 32, True, "float32", 1, 96, 96), "float32"),
    ],
)
def test_a_model_without_kernels_is_refused_with_the_reason(problem, said):
    with pytest.raises(RequestError, match=said):
        tiles.at_all_sizes([problem])
    fine = Problem(4, 32, True, "float16", 1, 64, 64)
    assert {(p.N, p.K) for p in tiles.at_all_sizes([problem, fine])} == {(64, 64)}


@pytest.fixture
def pretend_gpu(tmp_path, monkeypatch):
    """A GPU on which tiles take as many microseconds as they have rows; the user's home is a new directory."""

    def time_of(problem, tile):
        return 1.0 if tile is None else 1e-6 * tile.BN

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(op, "describe", lambda where: H200)
    monkeypatch.setattr(trial, "Trial", lambda where, timer: time_of)
    monkeypatch.setattr(choosing.Path, "home", lambda: tmp_path)
    tables_for.cache_clear()
    yield time_of
    tables_for.cache_clear()


def test_tuning_a_checkpoint_writes_the_table_that_choosing_reads(checkpoint, pretend_gpu, capsys):
    tune.tune_command(tune.TuneConfig(str(checkpoint)))
    problems = tiles.at_all_sizes(tiles.packed_problems(Checkpoint(checkpoint)))
    tables = tables_for(H200.name, H200.arch)
    rows = tables[0]["rows"]
    assert len(rows) == len(problems)
    for problem, row in zip(problems, rows, strict=True):
        assert asdict(choose(H200, problem, tables)) == row["tile"]
        assert row["us"] == row["tile"]["BN"]
    printed = capsys.readouterr()
    assert f"wrote {choosing.user_table(H200.name)}" in printed.out
    assert len(printed.out.splitlines()) == len(problems) + 1
    assert f"{len(problems)}/{len(problems)}: 256 tokens" in printed.err


def test_tuning_a_second_model_keeps_what_the_first_one_needs(checkpoint, llama, pretend_gpu, tmp_path):
    tune.tune_command(tune.TuneConfig(str(checkpoint)))
    half = save_tiny(tmp_path / "half", dtype=torch.float16)
    tune.tune_command(tune.TuneConfig(str(half), bits=8, group_size=32))
    rows = json.loads(choosing.user_table(H200.name).read_text())["rows"]
    assert {(row["bits"], row["dtype"]) for row in rows} == {(4, "bfloat16"), (8, "float16")}
    assert len(rows) == 2 * 6 * len(SHAPES)


def test_when_the_time_is_over_the_rest_is_left_out_and_counted(checkpoint, pretend_gpu, capsys, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0, 61.0])
    monkeypatch.setattr(tiles.time, "perf_counter", lambda: next(clock))
    tune.tune_command(tune.TuneConfig(str(checkpoint)))
    assert "no time for 21 of 24 problems: allow more with --seconds" in capsys.readouterr().out
    assert len(json.loads(choosing.user_table(H200.name).read_text())["rows"]) == 3


def test_no_time_for_anything_is_an_error_and_writes_no_table(checkpoint, pretend_gpu):
    with pytest.raises(WorkError, match="--seconds"):
        tune.tune_command(tune.TuneConfig(str(checkpoint), seconds=0.0))
    assert not choosing.user_table(H200.name).exists()


def test_a_gpu_on_which_nothing_runs_is_an_error_with_the_reason(checkpoint, pretend_gpu, monkeypatch):
    def broken(problem, tile):
        raise OSError("no kernel image is available")

    monkeypatch.setattr(trial, "Trial", lambda where, timer: broken)
    with pytest.raises(WorkError, match="no kernel image is available"):
        tune.tune_command(tune.TuneConfig(str(checkpoint)))


def test_a_float32_model_is_refused(llama, pretend_gpu):
    with pytest.raises(RequestError, match="float32"):
        tune.tune_command(tune.TuneConfig(str(llama)))
