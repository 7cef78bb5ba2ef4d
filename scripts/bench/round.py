"""The steps of the GPU round: what each one runs, how long it may take, and how it ended."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.results import Results, Row

ROOT = Path(__file__).parents[2]
_GRACE = 5  # seconds that a step has to end by itself
_WORKERS = 12
_PYTEST = ("-o", "addopts=", "--import-mode=importlib", "--strict-markers", "-v", "-rfE")
_PLUGINS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
_TOY_TESTS = ("-m", "interpret", "-k", "odd_number and 128", "tests/kernels/test_dequantize_matmul.py")


@dataclass(frozen=True)
class Step:
    """A part of the round. It gets a process of its own, so that nothing it does can hurt the others."""

    name: str
    seconds: float
    """It is stopped after this time."""
    tests: tuple[str, ...] = ()
    """Arguments for pytest. Without any, the step is one of bench.steps."""
    least: float = 15
    """It is not started with less time left."""


# The most valuable first.
STEPS = (
    Step("smoke", 45, ("-m", "gpu and smoke", "tests/kernels")),
    Step("pipeline", 100, ("-m", "gpu", "tests/llmq/runtime/test_cuda.py", "tests/llmq/qat/test_cuda_training.py")),
    Step("speed", 120),
    Step("decode", 110),
    Step("quantize", 80, least=30),
    Step("experts", 45),
    Step("tune", 100, least=30),
    Step("tests", 90, ("-m", "gpu", "tests/kernels")),
    Step("rest", 3600),
)


@dataclass(frozen=True)
class Round:
    """Where the steps run and what they write."""

    folder: Path
    environment: dict[str, str]
    toy: bool

    @property
    def results(self) -> Path:
        return self.folder / "round.jsonl"

    def command(self, step: Step, seconds: float) -> list[str]:
        """Return the command of a step."""
        if not step.tests:
            command = [sys.executable, "-m", "bench.steps", step.name, "--results", str(self.results)]
            return [*command, "--seconds", str(seconds), *(["--toy"] if self.toy else [])]
        # What a GPU machine may lack must not be named: pytest-timeout, pytest-xdist, the plugin of jaxtyping.
        parallel = not self.toy and importlib.util.find_spec("xdist") is not None
        options = ["-n", str(_WORKERS), "--dist", "worksteal"] if parallel else []
        tests = _TOY_TESTS if self.toy else step.tests
        return [sys.executable, "-m", "pytest", *_PYTEST, *_PLUGINS, *options, *tests]

    def run(self, step: Step, seconds: float, gpu: str) -> None:
        """Run a step. Its row in the results tells how it ended; its log is added to round.log."""
        log, started = self.folder / f"{step.name}.log", time.perf_counter()
        code = self._wait(self.command(step, seconds), log, seconds + (0 if step.tests else _GRACE))
        text, took = log.read_text(encoding="utf-8", errors="replace"), round(time.perf_counter() - started, 1)
        with (self.folder / "round.log").open("a", encoding="utf-8") as file:
            file.write(f"===== {step.name}: {took} s, exit code {code}\n{text}\n")
        log.unlink()
        row = _of_pytest(text, code) if step.tests else _of_tasks(text, code)
        if row is not None:  # else the step has written its own
            Results(self.results, gpu).add("step", (step.name,), {"seconds": took, "notes": [], **row})

    def _wait(self, command: list[str], log: Path, seconds: float) -> int | None:
        """Return the exit code, or None after ending the process and its children because the time was over."""
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _of_pytest(text: str, code: int | None) -> Row:
    """Return what the output of `pytest -v` tells, even if pytest was stopped."""
    outcomes = re.findall(r"\] (PASSED|FAILED|ERROR) tests|^tests/.* (PASSED|FAILED|ERROR)\b", text, re.MULTILINE)
    words = [one or other for one, other in outcomes]
    bad = len(words) - words.count("PASSED")
    row: Row = {"passed": words.count("PASSED"), "late": [] if code is not None else ["stopped by its limit"]}
    names = re.findall(r"^(?:FAILED|ERROR) (tests/.*)", text, re.MULTILINE)
    if bad or code not in (0, None):
        row |= {"failed": f"{bad} tests, exit code {code}: {'; '.join(names[:4]) or _last_line(text)}"[:500]}
    return row


def _of_tasks(text: str, code: int | None) -> Row | None:
    """Return the row of a step that could not write its own."""
    if code is None:
        return {"late": ["stopped by its limit"]}
    return None if code in (0, 1) and "Traceback" not in text else {"late": [], "failed": _last_line(text)}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]
