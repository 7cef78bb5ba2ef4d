"""Jobs in processes of their own: compiling uses many cores, and a broken GPU context breaks one job only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def run(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """(job, its result or the exception it ended in) for each job; with no workers, one after another in this process.

    Args:
        function: importable by name; gets a job that can be pickled.
        seconds: jobs that are not done by then end in TimeoutError, those whose process died too.
    """
    deadline = time.perf_counter() + seconds
    if workers == 0:
        for job in jobs:
            try:
                yield job, function(job) if time.perf_counter() < deadline else TimeoutError("no time left")
            except Exception as error:  # as in a process: the job's own affair
                yield job, error
        return
    context = multiprocessing.get_context("forkserver")  # imports once; CUDA does not survive a fork
    context.set_forkserver_preload(["bench.cold", "bench.correctness"])
    pool = context.Pool(min(workers, len(jobs)) or 1, maxtasksperchild=1)
    try:
        started = [(job, pool.apply_async(function, (job,))) for job in jobs]
        for job, handle in started:
            try:
                yield job, handle.get(max(0.1, deadline - time.perf_counter()))
            except multiprocessing.TimeoutError:
                yield job, TimeoutError("not done in time, or its process died")
            except Exception as error:
                yield job, error
    finally:
        pool.terminate()
