"""Runs in forked processes: some are killed as `kill -9` does it, some work together.

A moment at which a run is killed is counted in what it does to the disk, so that none between two changes is missed.
"""

import gc
import hashlib
import os
import signal
import socket
import sys
import time

import jaxtyping
import pytest
import torch
from small_runs import small_config

import llmq
import llmq.pipeline  # before any fork
from llmq.calibration.block_stream import _StreamedStates
from llmq.core.errors import LlmqError

# Ways in which the writer, the journal, the report and the hidden states change what is on the disk.
_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE = 180  # seconds
_NOT_COMPARED = {"llmq_report.json", "llmq_progress.jsonl"}  # which tell of times


def quantize_until(moment, config, count=None):
    """Exit code of a run that is killed at the moment-th change of the disk, where there are so many.

    Args:
        count: a file that gets the number of changes of a run that is not killed.
    """

    def work():
        changes = 0

        def hook(event, arguments):
            nonlocal changes
            if event in _CHANGES and (event != "open" or arguments[2] & _WRITES):
                changes += 1
                if changes == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        llmq.quantize(config)
        if count is not None:
            text = str(changes)
            count.write_text(text)

    return _exit_code(_forked(work))


def small_run(model, text, output):
    """Return a small request whose output is in the directory `output`."""
    return small_config(model, text, output / "out", device="cpu")


def interrupted(config, monkeypatch, blocks=1):
    """A run that ends, politely, when so many blocks are finished."""
    enter = _StreamedStates.enter

    def stop(self, index, *arguments):
        if index == blocks:
            raise KeyboardInterrupt
        return enter(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_StreamedStates, "enter", stop)
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(config)


def quantize_together(config, processes, fails=None, program="quantize"):
    """Exit codes of processes that quantize together, or train.

    Args:
        fails: called in each of them, with its number, before it begins.
        program: quantize or train.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
        if fails is not None:
            fails(rank)
        getattr(llmq, program)(config)

    children = [_forked(lambda rank=rank: work(rank)) for rank in range(processes)]
    return [_exit_code(child) for child in children]


def result_of(directory):
    """What a checkpoint's files hold, by name."""
    files = (path for path in directory.iterdir() if path.is_file() and path.name not in _NOT_COMPARED)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _forked(work):
    gc.freeze()  # the child's collections pass over what it shares with this process: no page of it is copied
    child = os.fork()
    if child:
        gc.unfreeze()
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        jaxtyping.config.update("jaxtyping_disable", True)  # shapes are checked in the runs that nobody kills
        work()
        code = 0
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _exit_code(child):
    """Return the exit code of a child; negative for a signal. Fails if the child hangs."""
    deadline = time.monotonic() + _PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"a process was still running after {_PATIENCE} seconds")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])
