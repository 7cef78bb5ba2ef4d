"""Runs that are killed as `kill -9` does it, at a moment that is counted in what they do to the disk."""

import os
import signal
import sys

import llmq

# Every way in which the writer, the journal, the report and the hidden states change what is on the disk.
_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def in_child(work):
    """Exit code of a child process that does this; negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def quantize_until(moment, config, count=None):
    """Quantize in a child process that is killed at the moment-th change of the disk, where there are so many.

    Args:
        count: a file that gets the number of changes so far.
    """

    def work():
        state = {"changes": 0, "busy": False}

        def hook(event, arguments):
            writes = event != "open" or "w" in str(arguments[1]) or "a" in str(arguments[1]) or "+" in str(arguments[1])
            if event not in _CHANGES or not writes or state["busy"]:
                return
            state["changes"] += 1
            if state["changes"] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        llmq.quantize(config)
        if count is not None:
            state["busy"] = True
            count.write_text(str(state["changes"]))

    return in_child(work)
