"""Commands in processes that are forked from this one, which has imported what takes a new Python five seconds.

To whoever starts and watches it, such a process is like any other: arguments, environment, directory, pipes, signals
and exit code are its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jaxtyping
import pytest
from commands import ROOT, run


class Forked(subprocess.Popen):
    """A process of its own; if it runs `python -m llmq…` or `python scripts/….py`, it is forked."""

    def _execute_child(self, words: Any, executable: Any, *options: Any) -> None:
        """Start the process; subprocess.py calls this with the same options since Python 3.10."""
        script, arguments = _ours(words)
        if script is None:
            super()._execute_child(words, executable, *options)
            return
        prepare, _, _, directory, environment, _, _, _, *pipes = options[:14]
        gc.freeze()  # the child's collections pass over what it shares with this process: no page of it is copied
        self.pid = os.fork()
        if not self.pid:
            try:
                _connect(pipes)
                os.chdir(directory or ".")
                if environment is not None:
                    os.environ.clear()
                    os.environ.update(environment)
                if prepare is not None:
                    prepare()
            except BaseException:
                os._exit(1)
            _become(script, arguments)
        gc.unfreeze()
        self._child_created = True
        self._close_pipe_fds(*pipes)


@contextmanager
def forking() -> Iterator[None]:
    """Inside, whatever starts a process with the module subprocess starts a Forked one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Forked)
        yield


def run_forked(module: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Do what `run` does, without the seconds that a new Python takes to import."""
    with forking():
        return run(module, *arguments, **options)


def _ours(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file of this project that a command runs, None if it runs none, and its arguments."""
    if words[:2] == [sys.executable, "-m"] and words[2].partition(".")[0] == "llmq":
        path = ROOT.joinpath(*words[2].split("."))
        return path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), words[3:]
    if words[0] == sys.executable and Path(words[1]).parent == ROOT / "scripts":
        return Path(words[1]), words[2:]
    return None, []


def _connect(pipes: list[int]) -> None:
    """Make stdin, stdout and stderr of the given pipes' ends, -1 for one that stays as it is."""
    read_in, write_in, read_out, write_out, read_err, write_err = pipes
    for number, pipe in enumerate((read_in, write_out, write_err)):
        if pipe != -1:
            os.dup2(pipe, number)
    for pipe in {read_in, write_in, read_out, write_out, read_err, write_err}:
        if pipe > 2:
            os.close(pipe)
    options = {"buffering": 1, "encoding": "utf-8", "closefd": False}
    sys.stdout, sys.stderr = (os.fdopen(number, "w", **options) for number in (1, 2))


def _become(script: Path, arguments: list[str]) -> NoReturn:
    """Be a new Python that runs this file, and end as it would."""
    code: Any = 1
    try:
        gc.callbacks.clear()  # hypothesis has one. A KeyboardInterrupt that is raised in there is lost.
        jaxtyping.config.update("jaxtyping_disable", True)  # a new Python checks no shapes
        _drop_capabilities()
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _drop_capabilities() -> None:
    """Lose the capabilities that are not in the bounding set, as root does when it starts a program."""
    sets = dict(re.findall(r"Cap(\w+):\s+(\w+)", Path("/proc/self/status").read_text()))
    left = [int(sets[name], 16) & int(sets["Bnd"], 16) for name in ("Eff", "Prm", "Inh")]
    words = [word >> shift & 0xFFFFFFFF for shift in (0, 32) for word in left]
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*words))
