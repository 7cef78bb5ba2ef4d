"""Run a tile on a device and time it. `tune` measures with this."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from llmq_kernels import reference
from llmq_kernels.choose import Problem, Tile
from llmq_kernels.dequantize_matmul import dequantize_matmul
from llmq_kernels.layout import PackedWeight, pack
from llmq_kernels.op import new_counters
from llmq_kernels.packed_matmul import packed_matmul

ROTATION = 200e6
"""Bytes of weights that a timing goes through before it comes back to the first: three times the L2 of an H200."""
# Relative Frobenius error. Results are rounded once; folded tiles and dequantizing round the weights too. Twice that.
_WRONG = {"float16": 1e-3, "bfloat16": 8e-3}
# Per second, no GPU's memory moves and no GPU's 16-bit tensor cores do as much (H200: 4.8e12 and 1e15).
_BYTES, _OPERATIONS = 5e12, 1e15
_GRAPH_SECONDS, _GRAPH_NODES, _WARM_SECONDS = 1e-3, 300, 5e-3


class Timer(Protocol):
    """Measures seconds per launch: one number for each repetition of all launches."""

    def __call__(self, launches: Sequence[Callable[[], object]], least: float, replays: int = 20) -> list[float]:
        """Return the times. `least`: seconds that one launch takes at least; a repetition is made long enough."""
        ...


class Trial:
    """The `time_of` of a real device: random weights, results checked against plain torch in float32."""

    def __init__(self, where: torch.device, timer: Timer, rotation: float = ROTATION) -> None:
        self._where, self._timer, self._rotation = where, timer, rotation
        self._counters = new_counters(where)
        self._data = lru_cache(maxsize=1)(self._make)  # problems come one after another, each with all its tiles

    def __call__(self, problem: Problem, tile: Tile | None) -> float:
        """Return the median seconds. Raises ValueError if the result is wrong, or differs between two runs."""
        x, weights, expected = self._data(problem)
        y, again = (multiply(x, weights[0], tile, self._counters) for _ in range(2))
        error = float((y.float() - expected).norm() / expected.norm())
        if not error <= _WRONG[problem.dtype]:  # NaN is wrong too
            raise ValueError(f"its result is off by {error:.1e}")
        if not torch.equal(y, again):
            raise ValueError("two runs gave different bits")
        launches = [lambda w=w: multiply(x, w, tile, self._counters) for w in weights]
        return statistics.median(self._timer(launches, least_seconds(problem)))

    def _make(self, problem: Problem) -> tuple[Tensor, list[PackedWeight], Tensor]:
        weight = pack(*random_codes(problem, self._where), problem.bits)
        x = random_tokens(problem, self._where)
        return x, rotated(weight, self._rotation), reference.matmul(x.float(), weight)


def multiply(x: Tensor, weight: PackedWeight, tile: Tile | None, counters: Tensor, y: Tensor | None = None) -> Tensor:
    """Return x Wᵀ: with a tile, or without one by dequantizing first (y is then a new tensor)."""
    if tile is None:
        return dequantize_matmul(x, weight, None)
    return packed_matmul(x, weight, None, counters, tile, y)


def random_codes(problem: Problem, where: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales in the problem's dtype, and zero points, of weights about as large as a model's."""
    generator = torch.Generator(where).manual_seed(seed)
    N, K, bits, groups = problem.N, problem.K, problem.bits, problem.K // problem.group_size
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=where, generator=generator)
    scale = (0.5 + torch.rand(N, groups, device=where, generator=generator)) * (0.07 / 2**bits)
    if problem.symmetric:
        zero = torch.full((N, groups), 2 ** (bits - 1), dtype=torch.uint8, device=where)
    else:
        zero = torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8, device=where, generator=generator)
        zero[0, 0] = 0  # or one weight in one group might look symmetric
    return codes, scale.to(getattr(torch, problem.dtype)), zero


def random_tokens(problem: Problem, where: torch.device, seed: int = 1) -> Tensor:
    """Return x [M, K]."""
    generator = torch.Generator(where).manual_seed(seed)
    return torch.randn(problem.M, problem.K, device=where, generator=generator).to(getattr(torch, problem.dtype))


def rotated(weight: PackedWeight, rotation: float = ROTATION) -> list[PackedWeight]:
    """Return the weight and copies of it, `rotation` bytes or more in all."""

    def copy() -> PackedWeight:
        return replace(weight, words=tuple(array.clone() for array in weight.words), grid=weight.grid.clone())

    return [weight, *(copy() for _ in range(max(1, math.ceil(rotation / nbytes(weight)) - 1)))]


def nbytes(weight: PackedWeight) -> int:
    return sum(tensor.nbytes for tensor in (*weight.words, weight.grid))


def least_seconds(problem: Problem) -> float:
    """Return the least seconds of any GPU for the problem: to read the codes, or to multiply."""
    weights = problem.N * problem.K
    return max(weights * problem.bits / 8 / _BYTES, 2 * problem.M * weights / _OPERATIONS)


def time_graph(launches: Sequence[Callable[[], object]], least: float, replays: int = 20) -> list[float]:
    """A Timer for GPUs: the launches one after another in a CUDA graph, so that no Python stands between them."""
    # Long enough that the start of a graph does not count, in as many rounds over the launches as that takes.
    nodes = min(_GRAPH_SECONDS / least, _GRAPH_NODES)
    rounds = max(1, round(nodes / len(launches)))
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first launch compiles and allocates, a capture must not
        launches[0]()
    graph = torch.cuda.CUDAGraph()
    with _no_garbage_collection(), torch.cuda.graph(graph, stream=side):
        for _ in range(rounds):
            for launch in launches:
                launch()
    warm = time.perf_counter() + _WARM_SECONDS  # clocks rise, the graph is uploaded
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 / (rounds * len(launches)) for start, end in pairwise(marks)]


@cache
def _side_stream() -> torch.cuda.Stream:
    """Return the one stream of all captures. It is not the default one; libraries keep a workspace per stream."""
    return torch.cuda.Stream()


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Stop garbage collection. A kernel collected during a capture would unload itself and end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
