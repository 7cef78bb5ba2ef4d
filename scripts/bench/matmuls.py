"""Tuning our tiles and timing every path, one row for each path, width and shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from llmq_kernels.choose import Device, Problem, Tile, bucket_of, choose, tables_for
from llmq_kernels.trial import Trial, least_seconds, random_tokens
from llmq_kernels.tune import candidates, tune

from bench import cold, peers
from bench.correctness import bar_of, errors
from bench.machine import timed
from bench.peers import Layer
from bench.session import Session, Task

_OURS = ("llmq", "dequantize")
_CHECKED = 64
"""Tokens whose results are compared with float64."""


def problems(session: Session, tokens: Iterable[int], bits: int = 4) -> list[Problem]:
    """For each number of tokens all shapes: at 4 bit every one, at other widths the large ones."""
    plan = session.plan
    wide = [(N, K) for N, K in plan.shapes if bits == 4 or plan.wide <= N * K]
    return [Problem(bits, plan.group, True, plan.dtype, M, N, K) for M in tokens for N, K in wide]


def to_tune(session: Session, tokens: Iterable[int], bits: int = 4) -> list[Problem]:
    """One for each bucket of a table and shape; those of up to 8 tokens are tuned at the fewest that are asked for."""
    buckets = {bucket_of(M): M for M in sorted(tokens, reverse=True)}
    return problems(session, sorted(buckets.values()), bits)


def ahead(session: Session, wanted: Iterable[Problem]) -> Iterator[Task]:
    """Compile all that tuning will try, beforehand and in parallel."""

    def work() -> None:
        left = [problem for problem in wanted if not session.results.has("tune", _tune_key(problem))]
        device = session.machine.device
        cold.ahead(session, [(p, tile) for p in left for tile in candidates(device, p)], min(90, session.left() / 4))

    yield Task("tune", None, work, seconds=20)


def tuning(session: Session, wanted: Iterable[Problem]) -> Iterator[Task]:
    """Find the best tile of each problem."""
    machine = session.machine
    trial = Trial(machine.where, machine.timer, session.plan.rotation)
    for problem in wanted:
        work = partial(_tune, machine.device, problem, trial)
        yield Task("tune", _tune_key(problem), work, seconds=5)


def _tune(device: Device, problem: Problem, trial: Trial) -> dict[str, Any]:
    return tune(device, [problem], trial)[0]


def _tune_key(problem: Problem) -> tuple[Any, ...]:
    return problem.bits, problem.dtype, bucket_of(problem.M), problem.N, problem.K


def times(session: Session, paths: Iterable[str], wanted: Iterable[Problem]) -> Iterator[Task]:
    """Time paths: for each problem all of them."""
    paths = list(paths)
    for problem in wanted:
        for path in paths:
            if peers.applies(path, problem, session.plan):
                key = (path, problem.bits, problem.dtype, problem.M, problem.N, problem.K)
                work, ours = partial(_time, session, path, problem), path in _OURS
                yield Task("time", key, work, ours, seconds=25 if path == "gemlite" else 4)


def tile_of(session: Session, problem: Problem) -> Tile | None:
    """What tuning said, in the other dtype if not in this one; else what users get."""
    device, rows = session.machine.device, session.results.of("tune")
    other = [row | {"dtype": problem.dtype} for row in rows]
    return choose(device, problem, ({"rows": rows}, {"rows": other}, *tables_for(device.name, device.arch)))


def _time(session: Session, path: str, problem: Problem) -> dict[str, Any]:
    machine = session.machine
    kind = replace(problem, M=1)
    if ("layer", kind) not in session.cache:
        session.cache["layer", kind] = Layer(machine, kind, session.plan.rotation)
    layer = session.cache["layer", kind]
    ours, tile = path in _OURS, tile_of(session, problem) if path == "llmq" else None
    products = layer.fused(tile) if ours else layer.products(path)
    x = random_tokens(replace(problem, dtype=peers.DTYPES.get(path, problem.dtype)), machine.where)

    y = products.copies[0](x)
    error, largest = errors(y[:_CHECKED], x[:_CHECKED], layer.exact())
    row = {
        "path": path,
        "bits": problem.bits,
        "group": problem.group_size,
        "dtype": str(x.dtype).removeprefix("torch."),
    }
    row |= {"M": problem.M, "N": problem.N, "K": problem.K, "error": error, "largest": largest}
    if ours:
        row["tile"] = None if tile is None else asdict(tile)
    bar = bar_of(tile, problem.dtype) if ours else 0.1
    if not error <= bar:  # a wrong result's time is not kept
        raise RuntimeError(f"computes something else: error {error:.2e}, bar {bar:.1e}, {tile}")
    launches = [lambda product=product: product(x) for product in products.copies]
    row |= timed(machine, launches, least_seconds(problem), session.plan.replays)
    row["weight_bytes"] = products.weight_bytes
    row["bytes"] = products.weight_bytes + x.nbytes + y.nbytes
    row["operations"] = 2 * problem.M * problem.N * problem.K
    return row
