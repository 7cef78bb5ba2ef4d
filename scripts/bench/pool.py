"""Run jobs in separate processes: compiling uses many cores, and a broken GPU context breaks only one job."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

_PRELOADED = ("bench.cold", "bench.correctness")


def run(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    seconds: float,
    preloaded: Sequence[str] = _PRELOADED,
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, its result or its exception) as jobs end. Without workers they run one by one in this process.

    Args:
        function: must be importable by name. Its argument is a job, which must be picklable.
        seconds: a job that is not done after this time has a TimeoutError as its result.
        preloaded: modules to import once, for all jobs. The first call decides.
    """
    deadline = time.perf_counter() + seconds
    if workers == 0:
        for job in jobs:
            try:
                yield job, function(job) if time.perf_counter() < deadline else TimeoutError("no time left")
            except Exception as error:  # it is the outcome of the job, as in a separate process
                yield job, error
        return
    waiting, running, processes = list(jobs), {}, []
    try:
        while (waiting or running) and time.perf_counter() < deadline:
            while waiting and len(running) < workers:
                pipe, process = _started(function, waiting[0], preloaded)
                running[pipe] = waiting.pop(0)
                processes.append(process)
            for pipe in wait(list(running), max(0.0, deadline - time.perf_counter())):
                yield running.pop(pipe), _received(pipe)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(5)  # a GPU context that ends later would disturb the next timing
    for job in (*running.values(), *waiting):
        yield job, TimeoutError("not done in time")


def _started(function: Callable[[Any], Any], job: Any, preloaded: Sequence[str]) -> tuple[Any, Any]:
    """Start a job. Returns (the pipe that will deliver the outcome, the process)."""
    context = multiprocessing.get_context("forkserver")  # imports only once; CUDA does not survive a plain fork
    context.set_forkserver_preload(list(preloaded))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(function, job, theirs), daemon=True)
    # Some versions of Python do not tell the fork server sys.path. It would then fail to import, without a message.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    theirs.close()  # now only the process holds the other end, so the pipe closes when the process dies
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
    except Exception as error:  # some exceptions cannot be sent between processes
        return error
    finally:
        pipe.close()
