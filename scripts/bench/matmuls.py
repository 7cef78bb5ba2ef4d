"""Tune the tiles of our kernels, and time every path: one row for each path, width and shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from llmq_kernels.choose import Device, Problem, Tile, bucket_of, choose, rule, tables_for
from llmq_kernels.trial import Trial, least_seconds, random_tokens
from llmq_kernels.tune import candidates, tune

from bench import cold, peers
from bench.correctness import bar_of, errors
from bench.machine import timed
from bench.peers import Layer
from bench.session import Session, Task

_OURS = ("llmq", "rule", "dequantize")
_CHECKED = 64
"""Number of tokens that are compared with float64."""


def problems(session: Session, tokens: Iterable[int], bits: int = 4) -> list[Problem]:
    """Return the problems for each number of tokens. At 4 bit they have all shapes, at other widths the large ones."""
    plan = session.plan
    wide = [(N, K) for N, K in plan.shapes if bits == 4 or plan.wide <= N * K]
    return [Problem(bits, plan.group, True, plan.dtype, M, N, K) for M in tokens for N, K in wide]


def to_tune(session: Session, tokens: Iterable[int], bits: int = 4) -> list[Problem]:
    """Return the problems to tune: one for each shape and each bucket of numbers of tokens.

    The smallest number of tokens in a bucket stands for the whole bucket.
    """
    buckets = {bucket_of(M): M for M in sorted(tokens, reverse=True)}
    return problems(session, sorted(buckets.values()), bits)


def ahead(session: Session, to_do: Iterable[Problem]) -> Iterator[Task]:
    """Yield a task that compiles, in parallel, all tiles that tuning will try."""

    def work() -> None:
        left = [problem for problem in to_do if not session.results.has("tune", _tune_key(problem))]
        device = session.machine.device
        cold.ahead(
            session,
            [(p, tile) for p in left for tile in candidates(device, p)[: session.plan.tiles]],
            min(90, session.left() / 4),
        )

    yield Task("tune", None, work, seconds=20)


def tuning(session: Session, to_do: Iterable[Problem]) -> Iterator[Task]:
    """Yield a task for each problem that finds its fastest tile."""
    machine = session.machine
    trial = Trial(machine.where, machine.timer, session.plan.rotation)
    for problem in to_do:
        work = partial(_tune, machine.device, problem, trial, session.plan.tiles)
        yield Task("tune", _tune_key(problem), work, seconds=5)


def _tune(device: Device, problem: Problem, trial: Trial, most: int) -> dict[str, Any]:
    return tune(device, [problem], trial, most=most)[0]


def _tune_key(problem: Problem) -> tuple[Any, ...]:
    return problem.bits, problem.dtype, bucket_of(problem.M), problem.N, problem.K


def times(session: Session, paths: Iterable[str], to_do: Iterable[Problem]) -> Iterator[Task]:
    """Yield a task for each problem and path that times it. All paths of one problem follow each other."""
    paths = list(paths)
    for problem in to_do:
        for path in paths:
            if peers.applies(path, problem, session.plan) and problem not in session.cache.get(("left out", path), ()):
                work, ours = partial(_time, session, path, problem), path in _OURS
                yield Task("time", (path, *peers.key_of(problem)), work, ours, seconds=4)


def tile_of(session: Session, path: str, problem: Problem) -> Tile | None:
    """Return the rule's tile; or the one tuned in this dtype, else in the other dtype, else the one that users get."""
    device, rows = session.machine.device, session.results.of("tune")
    if path == "rule":
        return rule(device, problem)
    if path == "dequantize":
        return None
    other = [row | {"dtype": problem.dtype} for row in rows]
    return choose(device, problem, ({"rows": rows}, {"rows": other}, *tables_for(device.name, device.arch)))


def _time(session: Session, path: str, problem: Problem) -> dict[str, Any]:
    machine = session.machine
    one_token = replace(problem, M=1)
    if ("layer", one_token) not in session.cache:
        session.cache["layer", one_token] = Layer(machine, one_token, session.plan.rotation)
    layer = session.cache["layer", one_token]
    ours = path in _OURS
    tile = tile_of(session, path, problem) if ours else None
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
    if not error <= bar:  # the time of a wrong result is not kept
        raise RuntimeError(f"wrong result: error {error:.2e} is above the bar {bar:.1e}, {tile}")
    launches = [lambda product=product: product(x) for product in products.copies]
    row |= timed(machine, launches, least_seconds(problem), session.plan.replays)
    row["weight_bytes"] = products.weight_bytes
    row["bytes"] = products.weight_bytes + x.nbytes + y.nbytes
    row["operations"] = 2 * problem.M * problem.N * problem.K
    return row
