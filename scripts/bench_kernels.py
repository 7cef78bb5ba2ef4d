"""Measure everything about the speed of the kernels in one call, in under ten minutes on one GPU.

The most valuable measurements come first. What does not fit into the time is left out. The order is: ceilings of the
machine; compile times; correctness of every width, group and dtype against float64; tuning; cuBLAS, torch's tinygemm
and our kernels on layers of LLaMA's shapes; a decoder of LLaMA-7B's shape end to end; more numbers of tokens, other
widths; gemlite, if it is installed. The script prints a table at the end.

    python scripts/bench_kernels.py --results h200.jsonl --table kernels/llmq_kernels/tuned/nvidia-h200.json
    python scripts/plot_kernels.py --results h200.jsonl --output plots

A second call with the same --results measures only what is missing. If llmq is not installed on the machine, put
PYTHONPATH=kernels in front. Exit code 1 means: something computed wrong results or did not run. The end of the table
says what.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import ceilings, cold, correctness, decoder, matmuls, peers, report
from bench.machine import the_machine
from bench.plan import FULL, TOY
from bench.results import Results
from bench.session import Session, Task
from llmq_kernels.tune import write_table

STEPS = ("ceiling", "compile", "correct", "tune", "time", "decode")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench_kernels.jsonl"),
        help="file of finished rows, one JSON object per line",
    )
    parser.add_argument(
        "--table", type=Path, help="file to write the tuned tiles to; llmq_kernels.choose reads such files"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="start nothing that would end later than this (default 540)"
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="kinds of rows to measure")
    parser.add_argument("--again", nargs="+", choices=STEPS, default=(), help="kinds of rows to measure again")
    parser.add_argument(
        "--toy",
        action="store_true",
        help="run tiny shapes in Triton's interpreter on a CPU: this tries the script and measures nothing",
    )
    return parser.parse_args()


def schedule(session: Session) -> Iterator[Task]:
    """Yield all tasks, the most valuable first."""
    plan = session.plan
    everywhere = ["llmq", *(path for path in peers.available() if not path.startswith("gemlite")), "dequantize"]
    gemlite = [path for path in peers.available() if path.startswith("gemlite")]
    first, later = (matmuls.problems(session, tokens) for tokens in (plan.first, plan.later))
    tuned = matmuls.to_tune(session, (*plan.first, *plan.later))
    decoding = list(decoder.problems(plan).values())
    early = [*matmuls.to_tune(session, plan.first), *decoding]
    yield from ceilings.tasks(session)
    yield from cold.tasks(session)
    yield from correctness.tasks(session)
    yield from matmuls.ahead(session, [*tuned, *decoding])
    yield from matmuls.tuning(session, early)
    yield from matmuls.times(session, everywhere, first)
    yield from decoder.tasks(session)
    yield Task("decode", None, lambda: session.cache.pop("models", None), seconds=0)
    yield from matmuls.tuning(session, tuned)
    yield from matmuls.times(session, everywhere, later)
    half = [replace(problem, dtype="float16") for problem in first]
    yield from matmuls.ahead(session, half)
    yield from matmuls.tuning(session, half)
    yield from matmuls.times(session, ["llmq"], half)
    wide = [problem for bits in plan.widths for problem in matmuls.problems(session, (1,), bits)]
    yield from matmuls.ahead(session, wide)
    yield from matmuls.tuning(session, wide)
    yield from matmuls.times(session, ["llmq"], wide)
    yield from matmuls.times(session, gemlite[:1], [*first, *later])
    yield from peers.ahead(session, gemlite[1:])
    yield from matmuls.times(session, gemlite[1:], [*first, *later])


def main() -> int:
    options = arguments()
    started = time.perf_counter()
    try:
        machine = the_machine(options.toy)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plan = TOY if options.toy else FULL
    results = Results(options.results, machine.device.name, tuple(options.again))
    session = Session(machine, plan, results, started + options.seconds, started)
    skipped = [task for task in schedule(session) if task.kind in options.only and not session.do(task)]
    rows = results.of("tune")
    if options.table and rows:
        write_table(options.table, machine.device, rows)
        session.notes.append(f"tuned tiles of {len(rows)} problems are in {options.table}")
    missing = [task for task in skipped if task.key is not None]
    if missing:
        session.notes.append(f"{len(missing)} rows did not fit into the time; make the same call again to resume")
    print("\n".join(report.table(session)))
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
