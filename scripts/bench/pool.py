"""Jobs in processes of their own: compiling uses many cores, and a broken GPU context breaks one job only."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any
from unittest import mock


def run(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """(job, its result or the exception it ended in) as they end; with no workers, one after another in this process.

    Args:
        function: importable by name; gets a job that can be pickled.
        seconds: jobs that are not done by then end in TimeoutError.
    """
    deadline = time.perf_counter() + seconds
    if workers == 0:
        for job in jobs:
            try:
                yield job, function(job) if time.perf_counter() < deadline else TimeoutError("no time left")
            except Exception as error:  # as in a process: the job's own affair
                yield job, error
        return
    waiting, running, processes = list(jobs), {}, []
    try:
        while (waiting or running) and time.perf_counter() < deadline:
            while waiting and len(running) < workers:
                pipe, process = _started(function, waiting[0])
                running[pipe] = waiting.pop(0)
                processes.append(process)
            for pipe in wait(list(running), max(0.0, deadline - time.perf_counter())):
                yield running.pop(pipe), _received(pipe)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(5)  # a GPU context that ends disturbs what is timed next
    for job in (*running.values(), *waiting):
        yield job, TimeoutError("not done in time")


def _started(function: Callable[[Any], Any], job: Any) -> tuple[Any, Any]:
    """(where the outcome will come out, the process)."""
    context = multiprocessing.get_context("forkserver")  # imports once; CUDA does not survive a fork
    context.set_forkserver_preload(["bench.cold", "bench.correctness"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(function, job, theirs), daemon=True)
    # The server that forks is not told sys.path by every version of Python, and keeps failing imports to itself.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    theirs.close()  # the process holds the only other end: the pipe ends when it dies
    return ours, process


def _work(function: Callable[[Any], Any], job: Any, pipe: Any) -> None:
    try:
        outcome = function(job)
    except Exception as error:
        outcome = error
    pipe.send(outcome)


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return ChildProcessError("its process died")
    except Exception as error:  # not every exception finds its way between processes
        return error
    finally:
        pipe.close()
