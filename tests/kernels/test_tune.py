"""Tuning, with made-up times: what is tried, what wins, and that the choice of later runs follows the table."""

import functools
import itertools
import json
import os
from dataclasses import asdict, replace

import pytest
from llmq_kernels import choose as choosing
from llmq_kernels import tune as tuning
from llmq_kernels.choose import (
    COUNTERS,
    Device,
    Problem,
    Tile,
    bucket_of,
    choose,
    rule,
    shared_bytes,
    tables_for,
    user_table,
)
from llmq_kernels.tune import merged, tune, write_table

H200 = Device("NVIDIA H200", 90, 132, 227 << 10)
A100 = Device("NVIDIA A100-SXM4-80GB", 80, 108, 163 << 10)
RTX4090 = Device("NVIDIA GeForce RTX 4090", 89, 128, 99 << 10)
BAR_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))
SHAPES = ((4096, 4096), (28672, 8192), (8192, 28672), (1, 1024), (576, 1536), (262144, 2048))
TOKENS = (1, 9, 32, 64, 65, 256, 4096)
PROBLEM = Problem(4, 128, True, "bfloat16", 1, 4096, 4096)

candidates = functools.cache(tuning.candidates)


def problems():
    for bits, group, M, (N, K) in itertools.product((2, 3, 4, 8), (16, 32, 128, -1), TOKENS, SHAPES):
        yield Problem(bits, K if group == -1 else group, True, "bfloat16", M, N, K)


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda device: device.name)
def test_candidates_begin_with_the_rules_tile_and_are_few_and_different(device):
    for problem in problems():
        tiles = candidates(device, problem)
        assert tiles[0] == rule(device, problem)
        assert len(tiles) == len(set(tiles)) <= 20
        assert (None in tiles) == (problem.M >= 64)


@pytest.mark.parametrize("M", [1, 16, 32, 64, 128])
@pytest.mark.parametrize(("N", "K"), BAR_SHAPES)
def test_there_is_something_to_choose_from_on_the_shapes_that_count(N, K, M):
    assert len(candidates(H200, replace(PROBLEM, M=M, N=N, K=K))) >= 9


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda device: device.name)
def test_every_candidate_can_be_launched_and_is_what_choose_makes_of_it(device):
    for problem in problems():
        for tile in candidates(device, problem):
            if tile is None:
                continue
            shared = shared_bytes(problem, tile.BM, tile.BN, tile.stages - 1, tile.chunk, device.arch)
            assert shared <= device.shared_bytes
            assert tile.chunk >= 16
            assert problem.plane % tile.chunk == 0
            tiles = -(-problem.N // tile.BN) * -(-problem.M // tile.BM)
            assert tile.splits == 1 or tiles <= COUNTERS
            assert choosing._fitted(tile, problem) == tile


def test_dependent_launch_is_tried_on_hopper_alone_beside_the_same_tile_without():
    pdl = [tile for tile in candidates(H200, PROBLEM) if tile is not None and tile.pdl]
    assert len(pdl) >= 4
    assert {replace(tile, pdl=False) for tile in pdl} < set(candidates(H200, PROBLEM))
    for device in (A100, RTX4090):
        assert not any(tile.pdl for tile in candidates(device, PROBLEM) if tile is not None)


def test_tall_tiles_scale_the_weights():
    tiles = candidates(H200, replace(PROBLEM, M=256))
    assert all(tile.fold for tile in tiles if tile is not None and tile.BM == 128)
    assert any(tile is not None and tile.BM == 128 for tile in tiles)


def by_size(problem, tile):
    """A time that grows with BN, and with splits of equal BN; dequantizing takes longest."""
    return 1.0 if tile is None else (tile.BN + tile.splits / 100 - tile.pdl / 1000) * 1e-6


def test_the_fastest_tile_wins_and_the_rules_time_is_told():
    (row,) = tune(H200, [PROBLEM], by_size)
    tiles = candidates(H200, PROBLEM)
    best = min(tiles, key=lambda tile: by_size(PROBLEM, tile))
    assert row["tile"] == asdict(best)
    assert row["us"] == pytest.approx(1e6 * by_size(PROBLEM, best), abs=1e-3)
    assert row["rule_us"] == pytest.approx(1e6 * by_size(PROBLEM, rule(H200, PROBLEM)), abs=1e-3)
    assert [entry["tile"] for entry in row["tried"]] == [asdict(tile) for tile in tiles]
    assert row["skipped"] == []


def test_dequantizing_first_can_win():
    problem = replace(PROBLEM, M=256)
    (row,) = tune(H200, [problem], lambda problem, tile: 1.0 if tile is None else 2.0)
    assert row["tile"] is None
    assert choose(H200, problem, [{"rows": [row]}]) is None
    assert rule(H200, problem) is not None


def test_a_tile_that_fails_is_skipped_and_the_reason_kept():
    def time_of(problem, tile):
        if tile.stages == 3:
            raise ValueError("out of resource: shared memory")
        return by_size(problem, tile)

    (row,) = tune(H200, [PROBLEM], time_of)
    assert row["tile"]["stages"] == 4
    assert row["rule_us"] is None
    assert {entry["why"] for entry in row["skipped"]} == {"ValueError: out of resource: shared memory"}
    assert len(row["skipped"]) + len(row["tried"]) == len(candidates(H200, PROBLEM))


def test_if_nothing_works_the_reason_is_raised():
    def time_of(problem, tile):
        raise OSError("the GPU fell off the bus")

    with pytest.raises(RuntimeError, match="the GPU fell off the bus"):
        tune(H200, [PROBLEM], time_of)


def test_tuning_stops_when_there_is_enough():
    asked = iter([False, False, True])
    rows = tune(H200, [replace(PROBLEM, M=M) for M in (1, 16, 32)], by_size, lambda: next(asked))
    assert [row["M"] for row in rows] == [8, 16]


@pytest.mark.parametrize(("M", "bucket"), [(1, 8), (8, 8), (9, 16), (256, 256), (257, 512), (4096, 4096), (9999, 4096)])
def test_a_table_files_tokens_under_the_bucket_that_choose_looks_in(M, bucket):
    assert bucket_of(M) == bucket
    problem = replace(PROBLEM, M=M)
    tile = {"BM": 16, "BN": 32, "warps": 2, "stages": 2}
    row = tune(H200, [problem], by_size)[0] | {"tile": tile}
    assert choose(H200, problem, [{"rows": [row]}]) == Tile(**tile)


def test_choosing_on_this_machine_follows_a_written_table(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing.Path, "home", lambda: tmp_path)
    tables_for.cache_clear()
    problem = replace(PROBLEM, group_size=4096)
    rows = tune(H200, [PROBLEM, problem], by_size)
    write_table(user_table(H200.name), H200, rows)
    tables = tables_for(H200.name, H200.arch)
    tables_for.cache_clear()
    assert [row["group"] for row in tables[0]["rows"]] == [128, -1]
    assert choose(H200, PROBLEM, tables) == Tile(**rows[0]["tile"])
    assert choose(H200, problem, tables) == Tile(**rows[1]["tile"])


def test_a_table_tells_the_gpu_versions_and_date_and_has_a_line_for_each_row(tmp_path):
    path = tmp_path / "new" / "table.json"
    rows = tune(H200, [PROBLEM, replace(PROBLEM, M=512)], by_size)
    write_table(path, H200, rows)
    table = json.loads(path.read_text())
    assert (table["gpu"], table["arch"]) == ("NVIDIA H200", 90)
    assert table.keys() == {"gpu", "arch", "triton", "kernels", "date", "rows"}
    assert [row.keys() for row in table["rows"]] == 2 * [
        {"bits", "group", "symmetric", "dtype", "M", "N", "K", "tile", "us"}
    ]
    assert len(path.read_text().splitlines()) == 2 + len(rows)
    write_table(path, H200, [])
    assert json.loads(path.read_text())["rows"] == []


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    rows = tune(H200, [PROBLEM], by_size)
    write_table(path, H200, rows)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_table(path, H200, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_new_rows_replace_those_for_the_same_problem_and_leave_the_others(tmp_path):
    path = tmp_path / "table.json"
    first, second = tune(H200, [PROBLEM, replace(PROBLEM, M=16)], by_size)
    assert merged(path, [first]) == [first]
    write_table(path, H200, [first, second])
    faster = first | {"us": 0.5, "tile": None}
    kept = merged(path, [faster])
    assert [(row["M"], row["us"]) for row in kept] == [(8, 0.5), (16, second["us"])]
    path.write_text("{broken")
    assert merged(path, [faster]) == [faster]
