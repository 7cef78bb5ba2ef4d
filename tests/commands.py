"""Runs the commands and scripts as a user does: arguments in; exit code, stdout and stderr out."""

import importlib.util
import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def command(module, *arguments):
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(module, *arguments, **options):
    """In a process of its own."""
    options = {"cwd": ROOT, "env": ENVIRONMENT} | options
    return subprocess.run(command(module, *arguments), capture_output=True, text=True, timeout=120, **options)


def execute_python(code):
    """What a new Python prints that runs this code."""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(module, *arguments):
    """In this process, which has imported all that takes a new one five seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        try:
            runpy.run_path(importlib.util.find_spec(module).origin, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())


def error_of(result):
    """The error message, after checking that it is one or two lines at the end of stderr and no traceback."""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, result.stderr
    message = lines[starts[0] :]
    assert len(message) <= 2, result.stderr
    return "\n".join(message)
