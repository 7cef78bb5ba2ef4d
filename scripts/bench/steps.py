"""Run one step of the GPU round in this process: its tasks, the most valuable first, until its time is over.

    python -m bench.steps speed --results round.jsonl --seconds 60

scripts/gpu_round.py does this for one step after the other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from llmq_kernels.choose import table_name
from llmq_kernels.tune import write_table

from bench import ceilings, cold, correctness, decoder, generation, matmuls, packed_experts, peers, quantizing
from bench.machine import about, the_machine
from bench.plan import FULL, TOY
from bench.results import Results
from bench.session import Session, Task


def _machine(_: Session) -> Iterator[Task]:
    yield Task("machine", (), about, ours=False)


def _speed(session: Session) -> Iterator[Task]:
    """Check the main width and group, then time the rule's tiles and the peers with few tokens."""
    to_do = matmuls.problems(session, session.plan.first)
    yield from ceilings.tasks(session)
    yield from cold.tasks(session)
    yield from correctness.tasks(session, first=True)
    yield from matmuls.times(session, ["rule", *peers.compiled()], to_do)
    for path in peers.compiling():
        yield from peers.ahead(session, path, to_do)
        yield from matmuls.times(session, [path], to_do)


def _decode(session: Session) -> Iterator[Task]:
    yield from generation.tasks(session)
    yield from decoder.tasks(session, decoder.HOW[:1])


def _tune(session: Session) -> Iterator[Task]:
    plan = session.plan
    to_do = [*matmuls.to_tune(session, plan.first), *decoder.problems(plan).values()]
    yield from matmuls.ahead(session, to_do)
    yield from matmuls.tuning(session, to_do)
    yield from matmuls.times(session, ["llmq"], matmuls.problems(session, plan.first))


def _rest(session: Session) -> Iterator[Task]:
    """More tokens, the other dtype and widths, gemlite tuned by itself, the compiled decoder, and all of the grid."""
    plan = session.plan
    first, later = (matmuls.problems(session, tokens) for tokens in (plan.first, plan.later))
    half = [replace(problem, dtype="float16") for problem in first]
    wide = [problem for bits in plan.widths for problem in matmuls.problems(session, (1,), bits)]
    yield from matmuls.times(session, ["rule", *peers.compiled()], later)
    for to_do, paths in ((matmuls.to_tune(session, plan.later), later), (half, half), (wide, wide)):
        yield from matmuls.ahead(session, to_do)
        yield from matmuls.tuning(session, to_do)
        yield from matmuls.times(session, ["llmq"], paths)
    yield from matmuls.times(session, ["cublas_fp16", "dequantize"], [*first, *later])
    yield from correctness.tasks(session)
    for path in peers.compiling():
        yield from matmuls.times(session, [path], later)
    for path in peers.tuning_themselves():
        yield from peers.ahead(session, path, first)
        yield from matmuls.times(session, [path], [*first, *later])
    yield from decoder.tasks(session, decoder.HOW[1:])


TASKS: dict[str, Callable[[Session], Iterator[Task]]] = {
    "machine": _machine,
    "speed": _speed,
    "decode": _decode,
    "quantize": quantizing.tasks,
    "experts": packed_experts.tasks,
    "tune": _tune,
    "rest": _rest,
}


def run(step: str, session: Session, folder: Path) -> int:
    """Do the tasks, write the row of the step and the table of tuned tiles. Returns 1 if something of ours failed."""
    for task in TASKS[step](session):
        session.do(task)
    rows = session.results.of("tune")
    if rows and step in ("tune", "rest"):
        write_table(folder / table_name(session.machine.device.name), session.machine.device, rows)
    seconds = round(time.perf_counter() - session.started, 1)
    row = {"seconds": seconds, "late": session.late, "notes": session.notes}
    failed = {"failed": f"{len(session.failures)} of its rows"} if session.failures else {}
    session.results.add("step", (step,), row | failed)
    return 1 if session.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=TASKS)
    parser.add_argument("--results", type=Path, required=True, help="file of finished rows, one JSON object per line")
    parser.add_argument("--seconds", type=float, required=True, help="start nothing that would end later than this")
    parser.add_argument("--toy", action="store_true", help="run tiny shapes in Triton's interpreter on a CPU")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        machine = the_machine(options.toy)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = Results(options.results, machine.device.name)
    session = Session(machine, TOY if options.toy else FULL, results, started + options.seconds, started)
    return run(options.step, session, options.results.parent)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without the minutes that a broken GPU context may take to end
