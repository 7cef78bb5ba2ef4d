"""Choosing a tile: tables first, then a rule whose every answer can be launched."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from llmq_kernels import choose as module
from llmq_kernels import tune
from llmq_kernels.choose import COUNTERS, M_BUCKETS, Device, Problem, Tile, choose, rule, shared_bytes, slug

# Shared memory that one block may ask for, by the CUDA programming guide's table of compute capabilities.
H200 = Device("NVIDIA H200", 90, 132, 227 << 10)
A100 = Device("NVIDIA A100-SXM4-80GB", 80, 108, 163 << 10)
RTX4090 = Device("NVIDIA GeForce RTX 4090", 89, 128, 99 << 10)
DEVICES = (H200, A100, RTX4090)
SHAPES = ((1, 1), (200, 480), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (262144, 2048))
PROBLEM = Problem(4, 128, True, "float16", 1, 4096, 4096)
TILE = {"BM": 8, "BN": 64, "warps": 4, "stages": 3, "splits": 2, "chunk": 64}


def row(N=4096, K=4096, M=8, tile=TILE, **kind):
    return {"bits": 4, "group": 128, "symmetric": True, "dtype": "float16", "M": M, "N": N, "K": K, "tile": tile} | kind


def table(*rows):
    return {"rows": list(rows)}


def tiled(BN):
    """A tile that can be told from others."""
    return TILE | {"BN": BN}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: slug(device.name))
def test_every_tile_of_the_rule_can_be_launched(device):
    kinds = list(itertools.product((2, 3, 4, 5, 6, 8), (16, 32, 128, -1)))
    every_M = zip(range(1, 301), itertools.cycle(kinds), itertools.cycle(SHAPES), strict=False)
    for M, (bits, group), (N, K) in (*every_M, *itertools.product((1, 16, 17, 64, 256), kinds, SHAPES)):
        size = K if group < 0 or group > K else group
        problem = Problem(bits, size, M % 2 == 0, "bfloat16", M, N, K)
        tile = choose(device, problem)
        assert (tile is None) == (M > 256)
        if tile is not None:
            assert_launchable(tile, problem, device)


def assert_launchable(tile, problem, device):
    assert tile.BM in (8, 16, 32, 64)
    assert tile.stages >= 2
    assert tile.BN in (64, 128)
    assert tile.warps == tile.BN // 16
    programs = min(2 if problem.bits in (3, 5, 6) else 4, {8: 4, 16: 3, 32: 2, 64: 1}[tile.BM])
    if device.arch < 90 and problem.bits == 2 and tile.BM in (16, 32) and tile.splits == 1:
        assert tile.registers == 200
        programs = 2
    else:
        assert (tile.registers is None) == (tile.BM > 16 or (problem.bits in (3, 5) and tile.chunk == 64))
    assert tile.registers is None or 32 * tile.warps * tile.registers * programs <= 65536
    buffers = tile.stages - 1
    assert shared_bytes(problem, tile.BM, tile.BN, buffers, tile.chunk, device.arch) <= device.shared_bytes
    assert_even(tile, problem)


def assert_even(tile, problem):
    """Every program has blocks, every tile of a split launch a counter, every plane whole chunks."""
    per_split = math.ceil(problem.blocks / tile.splits)
    assert (tile.splits - 1) * per_split < problem.blocks
    tiles = math.ceil(problem.N / tile.BN) * math.ceil(problem.M / tile.BM)
    assert tile.splits == 1 or tiles <= COUNTERS
    assert problem.plane % tile.chunk == 0
    assert tile.chunk >= 16


def test_a_tile_holds_the_tokens_without_much_to_spare():
    sizes = {rule(H200, replace(PROBLEM, M=M)).BM: M for M in range(256, 0, -1)}
    assert sizes == {8: 1, 16: 9, 32: 17, 64: 33}
    assert rule(H200, replace(PROBLEM, M=256, N=4104)).BM == 32


def test_few_tiles_split_their_inputs_to_fill_the_gpu():
    assert rule(H200, PROBLEM).splits == 8  # 64 tiles for 4 * 132 places
    assert rule(H200, replace(PROBLEM, N=64)).splits == 8  # two blocks of 256 inputs each
    assert rule(H200, replace(PROBLEM, N=28672)).splits == 1
    assert rule(H200, replace(PROBLEM, N=64 * 4 * 132)).splits == 1
    assert rule(replace(H200, multiprocessors=16), PROBLEM).splits == 1
    assert rule(H200, replace(PROBLEM, N=64, K=480)).splits == 1


@pytest.mark.parametrize(
    ("bits", "group", "K", "plane", "blocks"),
    [(4, 128, 4224, 64, 17), (2, 64, 576, 64, 2), (3, 16, 576, 16, 3), (8, 32, 480, 32, 8), (4, 16, 16, 64, 1)],
)
def test_a_problem_knows_its_planes_and_blocks(bits, group, K, plane, blocks):
    problem = Problem(bits, group, True, "float16", 1, 64, K)
    assert (problem.plane, problem.blocks) == (plane, blocks)


def test_the_first_table_that_has_a_row_wins():
    empty, other = table(), table(row(bits=8))
    first, second = table(row(tile=tiled(32))), table(row(tile=tiled(256)))
    assert choose(H200, PROBLEM, (empty, other, first, second)).BN == 32
    assert choose(H200, PROBLEM, (second, first)).BN == 256
    assert choose(H200, PROBLEM, (empty, other)) == rule(H200, PROBLEM)


def test_a_row_without_a_tile_means_to_dequantize():
    assert choose(H200, PROBLEM, (table(row(tile=None)), table(row()))) is None


@pytest.mark.parametrize(
    "kind", [{"bits": 3}, {"group": 64}, {"group": -1}, {"symmetric": False}, {"dtype": "bfloat16"}, {"M": 16}], ids=str
)
def test_a_row_of_another_kind_is_not_taken(kind):
    assert choose(H200, PROBLEM, (table(row(tile=tiled(32), **kind)),)) == rule(H200, PROBLEM)


def test_one_group_per_row_is_a_kind_of_its_own():
    rows = table(row(group=-1, tile=tiled(32)), row(group=4096, tile=tiled(256)))
    assert choose(H200, replace(PROBLEM, group_size=4096), (rows,)).BN == 32
    assert choose(H200, replace(PROBLEM, group_size=4096, K=8192), (rows,)).BN == 256


@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 64, 65, 256, 257, 1024, 1025, 4096, 5000])
def test_the_number_of_tokens_is_rounded_up_to_a_measured_one(M):
    rows = table(*(row(M=bucket, tile=TILE | {"warps": i}) for i, bucket in enumerate(M_BUCKETS)))
    bucket = M_BUCKETS[choose(H200, replace(PROBLEM, M=M), (rows,)).warps]
    assert bucket >= min(M, 4096)
    assert not any(M <= smaller < bucket for smaller in M_BUCKETS)


def test_the_row_of_the_nearest_shape_is_taken():
    rows = [row(N, K, tile=tiled(N + K)) for N, K in ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))]
    for order in (rows, rows[::-1]):
        for (N, K), nearest in {
            (4096, 4096): (4096, 4096),
            (5000, 3000): (4096, 4096),
            (9000, 5000): (11008, 4096),
            (14336, 4096): (11008, 4096),
            (4096, 8000): (4096, 11008),
            (24576, 9000): (28672, 8192),
        }.items():
            tile = choose(H200, replace(PROBLEM, N=N, K=K), (table(*order),))
            assert sum(nearest) == tile.BN


@pytest.mark.parametrize("factor", [2.5, 1 / 2.5])
def test_shapes_too_far_from_every_row_go_by_the_rule(factor):
    for problem in (replace(PROBLEM, N=int(4096 * factor)), replace(PROBLEM, K=int(32 * factor) * 128)):
        assert choose(H200, problem, (table(row(tile=tiled(32))),)) == rule(H200, problem)
    near = replace(PROBLEM, N=int(4096 * (2.3 if factor > 1 else 1 / 2.3)))
    assert choose(H200, near, (table(row(tile=tiled(32))),)).BN == 32


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7, 16, 40])
def test_a_measured_tile_is_fitted_to_the_problem(splits):
    for bits, group, K in itertools.product((2, 3, 4, 5, 6, 8), (16, 32, 128), (2048, 4096, 5120, 8192)):
        problem = Problem(bits, group, True, "float16", 1, 4096, K)
        rows = table(row(K=4096, bits=bits, group=group, tile=TILE | {"splits": splits}))
        tile = choose(H200, problem, (rows,))
        assert_even(tile, problem)
        assert tile.splits <= splits
        assert tile == Tile(8, 64, 4, 3, tile.splits, problem.plane)


def test_a_measured_tile_is_not_split_where_counters_would_run_out():
    rows = table(row(N=131072, tile=TILE | {"splits": 2}))
    assert choose(H200, replace(PROBLEM, N=64 * COUNTERS), (rows,)).splits == 2
    assert choose(H200, replace(PROBLEM, N=64 * COUNTERS + 1), (rows,)).splits == 1


def test_choosing_changes_nothing_and_always_answers_the_same():
    tables = (table(row(tile=TILE | {"splits": 40}), row(M=16)),)
    before = json.dumps(tables)
    answers = {choose(H200, replace(PROBLEM, M=16 if i % 2 else 1), tables) for i in range(10)}
    assert len(answers) == 2
    assert json.dumps(tables) == before


def test_a_gpus_name_becomes_a_file_name():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert slug("  (Tesla) T4_x ") == "tesla-t4-x"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    module.forget_tables()
    yield tmp_path
    module.forget_tables()


def test_a_users_table_is_named_after_all_that_its_numbers_depend_on(home):
    folder = Path(module.__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in ("layout.py", "planes.py", "packed_matmul.py"))
    digest = hashlib.sha256(sources).hexdigest()[:8]
    assert module.versions() == {"triton": version("triton"), "kernels": digest}
    name = f"nvidia-h200-triton{version('triton')}-{digest}.json"
    assert module.user_table("NVIDIA H200") == home / ".cache" / "llmq" / "tuned" / name


def put(path, gpu="NVIDIA H200", **changes):
    """Write a table that says what it is for. Returns its first row's tile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"gpu": gpu, "arch": 90, **module.versions()} | changes
    path.write_text(json.dumps(head | {"from": path.parent.parent.name, "rows": [row(tile=tiled(32))]}))
    module.forget_tables()


def served(name="NVIDIA H200", arch=90):
    return [table["from"] for table in module.tables_for(name, arch)]


@pytest.fixture
def shipped(home, tmp_path, monkeypatch):
    """Return the path of the shipped table for an H200."""
    module.versions()  # read from the real files
    monkeypatch.setattr(module, "__file__", str(tmp_path / "package" / "choose.py"))
    return tmp_path / "package" / "tuned" / module.table_name("NVIDIA H200")


def test_tables_are_the_users_and_then_the_shipped_one(shipped):
    assert served() == []
    put(shipped)
    assert served() == ["package"]
    put(module.user_table("NVIDIA H200"))
    assert served() == ["llmq", "package"]


@pytest.mark.parametrize(
    "other", [{"gpu": "NVIDIA H100 80GB HBM3"}, {"arch": 89}, {"triton": "3.0.0"}, {"kernels": "0"}], ids=str
)
def test_a_table_that_says_it_is_for_something_else_is_not_served_whatever_its_name(shipped, other):
    put(shipped, **other)
    put(module.user_table("NVIDIA H200"), **other)
    assert served() == []
    assert module.tile_for(H200, PROBLEM) == rule(H200, PROBLEM)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", "nvidia-h200"])
def test_a_table_of_one_card_is_never_served_to_another(shipped, name):
    put(shipped)
    put(module.user_table("NVIDIA H200"))
    assert served(name) == []
    assert module.tile_for(replace(H200, name=name), PROBLEM) == rule(H200, PROBLEM)


def test_a_table_that_is_written_is_seen_by_the_same_process(shipped):
    device = replace(H200, name="NVIDIA H200")
    assert module.tile_for(device, PROBLEM) == rule(device, PROBLEM)
    tune.write_table(module.user_table(device.name), device, [row(tile=tiled(32)) | {"us": 1.0}])
    assert module.tile_for(device, PROBLEM).BN == 32
