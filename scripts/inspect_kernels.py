"""Compile the Triton kernels for GPUs that this machine does not have, and print one row per configuration.

The script needs no GPU and no CUDA toolkit: Triton's wheel contains ptxas and the disassembler. The launching code of
the kernels runs unchanged, on tensors without data. The tiles are those that `llmq_kernels.choose` picks.

    python scripts/inspect_kernels.py                          # a selection in about a minute; the tests check it
    python scripts/inspect_kernels.py --all --arch 90          # all that the rule can return: an hour
    python scripts/inspect_kernels.py --only bits=4 M=1 --sass sass
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import llmq_kernels
from ahead_of_time import TOP, Case, Row, inspect
from llmq_kernels.choose import Device, Problem, Tile, rule
from llmq_kernels.experts_op import rule_for_experts

# Name, architecture, multiprocessors, and the shared memory that one thread block may use.
DEVICES = (
    Device("A100", 80, 108, 163 << 10),
    Device("RTX 4090", 89, 128, 99 << 10),
    Device("H200", 90, 132, 227 << 10),
)
BITS, DTYPES, TOKENS = (2, 3, 4, 5, 6, 8), ("float16", "bfloat16"), (1, 16, 32, 64, 256)
GROUPS = (16, 32, 64, 128, 256, -1)
SPLIT_N, WHOLE_N = 1024, 1 << 16
"""Rows of W: with SPLIT_N the rule splits K on every device, with WHOLE_N on none."""

EXPERTS = 128


def problem(bits: int, group: int, symmetric: bool, dtype: str, M: int, N: int = SPLIT_N) -> Problem:
    """Return a problem with K = 4096, which fills whole blocks of words."""
    return Problem(bits, 4096 if group == -1 else group, symmetric, dtype, M, N, 4096)


def uneven(even: Problem) -> Problem:
    """Return the problem with a K that does not fill whole blocks. With one group per row, K is odd."""
    whole = even.group_size == even.K
    K = even.K + (3 if whole else even.group_size)
    return replace(even, K=K, group_size=K if whole else even.group_size)


def by_rule(device: Device, asked: Problem, bias: bool = False) -> Case:
    """Return the case with the tile that the rule chooses for this problem."""
    return Case(device, asked, rule(device, asked), bias)


def of_experts(case: Case) -> Case:
    """Return the case of as many experts with weights as this one, with its tile."""
    return replace(case, experts=EXPERTS)


def routed_by_rule(device: Device, asked: Problem, bias: bool = False) -> Case:
    """Return the case of experts with the tile that the rule chooses for problem.M tokens."""
    return Case(device, asked, rule_for_experts(device, asked, EXPERTS, TOP), bias, EXPERTS)


def every_case(device: Device) -> Iterator[Case]:
    """Yield every kind of call that the rule can make on a device. Some kinds come several times."""
    kinds = product(BITS, DTYPES, (True, False), GROUPS, TOKENS, (SPLIT_N, WHOLE_N), (True, False), (False, True))
    for bits, dtype, symmetric, group, M, N, even, bias in kinds:
        asked = problem(bits, group, symmetric, dtype, M, N)
        case = by_rule(device, asked if even else uneven(asked), bias)
        yield case
        if device.arch >= 90 and M == 1 and not bias and case.tile is not None:
            yield replace(case, tile=replace(case.tile, pdl=True))
        if N == SPLIT_N:
            yield routed_by_rule(device, case.problem, bias)
    for bits, dtype, symmetric, group, even in product(BITS, DTYPES, (True, False), GROUPS, (True, False)):
        asked = problem(bits, group, symmetric, dtype, 1)
        yield Case(device, asked if even else uneven(asked), None)


def cover(device: Device) -> Iterator[Case]:
    """Yield few calls that together contain every value of every property.

    There are fewer for sm_89, because it shares nearly all code with sm_80, and for experts, because their loop is that
    of the dense kernel.
    """
    few = device.arch == 89
    for bits, dtype, symmetric in product(BITS, DTYPES, (True, False)):
        if (bits == 4 and symmetric) if few else (symmetric or bits == 4 or dtype == "float16"):
            case = by_rule(device, problem(bits, 128, symmetric, dtype, 1))
            yield case
            if dtype == "bfloat16" and (symmetric or bits == 4):
                yield of_experts(case)
    for dtype, M in product(DTYPES[:1] if few else DTYPES, TOKENS[1:4]):
        case = by_rule(device, problem(4, 128, True, dtype, M))
        yield case
        if dtype == "float16" and not few:
            yield of_experts(case)
    for bits, dtype in product((3,) if few else BITS, DTYPES):
        yield Case(device, problem(bits, 128, bits == 3, dtype, 1), None)
    if few:
        return
    for bits in (2, 3, 5, 6, 8):
        yield by_rule(device, problem(bits, 128, bits == 2, "float16", 16))
    for group in (group for group in GROUPS if group != 128):
        yield by_rule(device, problem(4, group, True, "float16", 1))
    for M, (N, K) in ((1, (1536, 2048)), (32, (2048, 768)), (256, (1536, 2048))):  # Qwen3-30B-A3B
        yield routed_by_rule(device, replace(problem(4, 128, True, "bfloat16", M, N), K=K))
    yield routed_by_rule(device, Problem(4, 32, False, "bfloat16", 64, 5760, 2880), bias=True)  # gpt-oss
    odd = uneven(problem(4, -1, False, "float16", 1, 50257))  # neither N nor K is a multiple of 16
    yield by_rule(device, odd, bias=True)
    yield by_rule(device, uneven(problem(4, 128, True, "bfloat16", 64, WHOLE_N)), bias=True)
    yield by_rule(device, uneven(problem(4, 64, False, "bfloat16", 32)))
    yield by_rule(device, uneven(problem(4, 128, True, "bfloat16", 64, 203)))  # the sums of splits for an odd N
    if device.arch >= 90:
        case = by_rule(device, problem(4, 128, True, "float16", 1))
        assert case.tile is not None
        yield replace(case, tile=replace(case.tile, pdl=True))


def tuned_cases(folder: Path) -> Iterator[Case]:
    """Yield every tile of the tables in `folder`, each on the architecture that its table names."""
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        device = next((device for device in DEVICES if device.arch == table["arch"]), DEVICES[-1])
        for row in table["rows"]:
            if row["tile"] is not None:
                size = row["K"] if row["group"] == -1 else row["group"]
                values = (row["bits"], size, row["symmetric"], row["dtype"], row["M"], row["N"], row["K"])
                yield Case(device, Problem(*values), Tile(**row["tile"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile all that the rule can return, not a selection")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 89, 90], choices=[80, 89, 90], help="GPU architectures, as in sm_80"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FIELD=VALUE", help="compile only such problems, e.g. bits=4 M=1"
    )
    parser.add_argument("--sass", type=Path, help="folder to write the disassembled kernels to")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    required = dict(text.split("=") for text in options.only)
    cases = [case for device in DEVICES for case in (every_case if options.all else cover)(device)]
    cases += tuned_cases(Path(llmq_kernels.__file__).parent / "tuned")
    cases = [case for case in cases if case.device.arch in options.arch]
    cases = [c for c in cases if all(str(getattr(c.problem, key)) == value for key, value in required.items())]
    names = [field.name for field in fields(Row)]
    if not options.json:
        print(" ".join(names))
    for row in inspect(cases, options.sass):
        values = asdict(row)
        print(json.dumps(values) if options.json else " ".join(f"{values[n]!s:>{len(n)}}" for n in names), flush=True)


if __name__ == "__main__":
    sys.exit(main())
