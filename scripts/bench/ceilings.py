"""Measure the ceilings of the machine: memory bandwidth, tensor cores, and the shortest time between launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.machine import timed
from bench.session import Session, Task

# (numbers that a program reads at a time, warps, reads per program). The fastest of these counts.
_READERS = ((4096, 8, 4), (4096, 4, 8), (2048, 4, 16), (8192, 8, 8), (8192, 8, 32))


@triton.jit
def sum_kernel(x: Any, sums: Any, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    """Compute sums[program], the sum of the BLOCK * TIMES numbers of this program."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * TIMES)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(TIMES):
        acc += tl.load(x + start + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(acc))


@triton.jit
def step_kernel(x: Any, PDL: tl.constexpr):
    """Compute x += 1: almost nothing, but each launch depends on the launch before it."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
    tl.store(x, tl.load(x) + 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


def tasks(session: Session) -> Iterator[Task]:
    """Yield the tasks: reading, copying, multiplying, launching."""
    works: dict[str, Callable[[Session], dict[str, Any]]] = {"read": _read, "copy": _copy, "matmul": _matmul}
    works["interval"] = lambda session: _interval(session, pdl=False)
    if session.machine.device.arch == 90:
        works["interval_pdl"] = lambda session: _interval(session, pdl=True)
    for name, work in works.items():
        yield Task("ceiling", (name,), lambda work=work: work(session), ours=False)


def _buffer(session: Session) -> Tensor:
    return torch.rand(session.plan.read_bytes // 4, device=session.machine.where)


def _read(session: Session) -> dict[str, Any]:
    x, best = _buffer(session), {}
    for block, warps, times in _READERS:
        programs = len(x) // (block * times)
        if programs == 0:
            continue
        sums = torch.empty(programs, device=x.device)
        kernel: Any = sum_kernel[(programs,)]
        launch = partial(kernel, x, sums, block, times, num_warps=warps)
        timing = timed(session.machine, [launch], x.nbytes / 5e12, session.plan.replays)
        expected = x[: programs * block * times].sum(dtype=torch.float64)
        if not abs(sums.sum(dtype=torch.float64) - expected) < 1e-4 * expected:
            raise RuntimeError("the kernel that measures reading computed a wrong sum")
        timing |= {"rate": 4e6 * programs * block * times / timing["us"], "reader": [block, warps, times]}
        if timing["rate"] > best.get("rate", 0.0):
            best = timing
    return best


def _copy(session: Session) -> dict[str, Any]:
    x = _buffer(session)
    y = torch.empty_like(x)
    timing = timed(session.machine, [lambda: y.copy_(x)], 2 * x.nbytes / 5e12, session.plan.replays)
    return timing | {"rate": 2e6 * x.nbytes / timing["us"]}


def _matmul(session: Session) -> dict[str, Any]:
    side = session.plan.square
    a, b = (torch.randn(side, side, device=session.machine.where).to(torch.bfloat16) for _ in range(2))
    timing = timed(session.machine, [lambda: a @ b], 2 * side**3 / 1e15, session.plan.replays)
    return timing | {"rate": 2e6 * side**3 / timing["us"]}


def _interval(session: Session, pdl: bool) -> dict[str, Any]:
    x = torch.zeros(1, dtype=torch.int32, device=session.machine.where)
    options = {"launch_pdl": True} if pdl else {}
    kernel: Any = step_kernel[(1,)]
    launches = [partial(kernel, x, pdl, num_warps=1, **options)] * session.plan.nodes
    return timed(session.machine, launches, 1e-6, session.plan.replays)
