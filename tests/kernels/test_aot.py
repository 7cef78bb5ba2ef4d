"""What the compiler makes of every kind of launch, for GPUs that are not here.

Never in the process of the interpreter's tests: it replaces the kernels when it is switched on.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import compiled, recorded, uncached
from llmq_kernels import gptq_columns, packed_experts

pytestmark = pytest.mark.together
ROOT = Path(__file__).parents[2]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# What an H200's memory allows for each weight it delivers, at 1.98 GHz and 4.4 TB/s. At most, for up to 8 tokens:
BUDGET = {2: 2.1, 3: 3.1, 4: 4.0, 5: 4.9, 6: 5.9, 8: 7.8}
ARRAYS = {3: 3, 5: 5, 6: 3}  # of words, that a step of codes in two arrays reads


@pytest.fixture(scope="module")
def rows():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, str(ROOT / "scripts" / "inspect_kernels.py"), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    return rows


def matmuls(rows, kernels=("packed_matmul",), **kind):
    found = [r for r in rows if r["kernel"] in kernels and all(r[key] == value for key, value in kind.items())]
    assert found, kind
    return found


BOTH = ("packed_matmul", "packed_experts")


def test_the_cover_has_every_arch_width_dtype_and_kernel(rows):
    kinds = {(row["kernel"], row["arch"], row["bits"], row["dtype"]) for row in rows}
    for kernel in (*BOTH, "dequantize"):
        for arch in (80, 90):
            # The loop of experts is the dense one, where every width meets every dtype.
            for dtype in ("float16", "bfloat16") if kernel != "packed_experts" else ("bfloat16",):
                assert {bits for bits in BUDGET if (kernel, arch, bits, dtype) in kinds} == set(BUDGET)
            assert (kernel, arch, 4, "float16") in kinds
        assert (kernel, 89) in {kind[:2] for kind in kinds}
    assert {row["group"] for row in matmuls(rows, arch=90)} == {-1, 16, 32, 64, 128, 256}
    assert {row["BM"] for row in matmuls(rows, arch=90, bits=4)} >= {8, 16, 32, 64}
    assert {row["pdl"] for row in matmuls(rows, arch=90)} == {True, False}


def test_nothing_spills_and_nothing_lives_on_the_stack(rows):
    assert [row for row in rows if row["spill"] or row["stack"] or row["local_in_loop"]] == []


def test_shared_memory_fits_and_is_what_the_rule_counted_on(rows):
    assert [row for row in rows if row["shared"] > SHARED[row["arch"]]] == []
    assert [row for row in matmuls(rows, BOTH) if row["shared"] > row["estimate"]] == []


def test_no_integer_is_converted_to_a_float(rows):
    # Of experts, one before the loop is: a pair's number is divided by the choices of a token.
    assert [row for row in rows if row["i2f"] > (row["kernel"] == "packed_experts")] == []


def test_weights_come_by_asynchronous_copies_of_16_bytes_and_leave_by_stores_of_16(rows):
    for row in matmuls(rows, BOTH):
        words = row["BN"] * row["chunk"] * 2 * ARRAYS.get(row["bits"], 1)
        # Once in the loop, and for each stage but the last before it. (Few tokens make pieces of 8 bytes a thread.)
        assert row["copies16"] >= row["stages"] * words // (16 * 32 * row["warps"]) > 0, row
    assert [row for row in rows if row["kernel"] == "dequantize" and row["even_k"] and not row["stores16"]] == []


def test_tensor_cores_multiply_and_hoppers_own_ones_where_tiles_are_tall_enough(rows):
    for row in matmuls(rows, BOTH):
        if row["arch"] == 90 and row["BM"] >= 16:
            assert (row["hgmma"] > 0, row["hmma"]) == (True, 0), row
        else:
            assert row["hmma"] > 0, row
    assert [row for row in rows if row["serialized"]] == []


@pytest.mark.parametrize("arch", [80, 90])
def test_a_4_bit_weight_costs_at_most_two_and_a_fifth_instructions(rows, arch):
    kind = {"arch": arch, "bits": 4, "group": 128, "symmetric": True, "dtype": "float16", "BM": 8, "even_k": True}
    assert all(1 < row["per_weight"] <= 2.2 for row in matmuls(rows, **kind))


def test_every_width_stays_within_what_an_h200s_memory_allows(rows):
    for row in matmuls(rows, arch=90, BM=8):
        if row["group"] == -1 or row["group"] >= 64:
            assert 1 < row["per_weight"] <= BUDGET[row["bits"]], row


def test_taller_tiles_and_other_groups_cost_no_more_than_they_do_now(rows):
    for row in matmuls(rows, arch=90, bits=4):
        most = {16: 3.0, 32: 3.2, 64: 3.6, 128: 4.0}.get(row["BM"], {16: 5.8, 32: 3.3}.get(row["group"], 2.6))
        assert row["per_weight"] <= most + (0 if row["even_k"] else 1), row
    assert all(row["per_weight"] <= 9.5 for row in rows if row["kernel"] == "dequantize")


def test_a_weight_of_an_expert_costs_at_most_15_percent_more_instructions_than_one_of_a_dense_layer(rows):
    key = ("arch", "dtype", "bits", "group", "symmetric", "even_k", "BM", "BN", "chunk", "warps", "stages")
    dense = {tuple(row[name] for name in key): row["per_weight"] for row in matmuls(rows)}
    compared = [row for row in matmuls(rows, ("packed_experts",)) if tuple(row[name] for name in key) in dense]
    assert {(row["arch"], row["bits"]) for row in compared} >= {(arch, bits) for arch in (80, 90) for bits in BUDGET}
    assert {row["BM"] for row in compared} == {8, 16, 32, 64}
    for row in compared:
        assert row["per_weight"] <= 1.15 * dense[tuple(row[name] for name in key)], row


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("tokens", "experts", "BM"), [(2, 8, 8), (32, 128, 8), (256, 512, 64)])
def test_the_routing_of_tokens_stays_in_registers(tokens, experts, BM, arch):
    with recorded(packed_experts, "route_kernel") as launches, uncached():
        packed_experts.route(torch.empty(tokens, 8, dtype=torch.int64, device="meta"), experts, BM)
        _, log = compiled(launches[0], arch)
    assert re.search(r" (\d+) bytes stack frame, (\d+) bytes spill stores", log).groups() == ("0", "0")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", [64, 128])
def test_gptqs_inner_loop_keeps_its_columns_in_registers(arch, size):
    W, U, grid = (torch.empty(shape, device="meta") for shape in ((size, 576), (size, size), (576,)))
    with recorded(gptq_columns, "round_columns_kernel") as launches, uncached():
        gptq_columns.round_columns(W, U, grid, grid, 4)
        binary, log = compiled(launches[0], arch)
    registers, frame = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack frame", log)
    assert int(frame[1]) == 0
    assert 3 * 128 * int(registers[1]) <= 65536  # three programs on a multiprocessor
    assert binary.metadata.shared <= 4096
