"""The kill test: runs that are killed at random moments, gone on with, and compared with one that was left alone.

A case is a run in a fresh directory, `kill -9` at a moment drawn evenly from the duration of the whole run (a third of
the cases are killed once more while they go on), and `--resume` until it is done. It passes if nothing looked finished
on the way unless it was whole, and every file ends with the bytes of the uninterrupted run.

    python scripts/soak.py --times 20 --offload
    python scripts/soak.py --model model-1b --flags "--method awq+gptq --samples 4"
"""

from __future__ import annotations

import hashlib
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.cli import run
from llmq.core.errors import WorkError
from llmq.run.journal import read_journal

FLAGS = "--calibration pydoc --samples 8 --sequence-length 256 --group-size 64"


@dataclass(frozen=True)
class SoakConfig:
    """Kill a quantization at random moments and see whether what is resumed ends in the same bytes."""

    model: str = "demo"
    """Directory, hub id, .gguf file or demo."""
    flags: str = ""
    """More flags of llmq.quantize, or others than `--calibration pydoc --samples 8 --sequence-length 256
    --group-size 64`."""
    times: int = 20
    """Cases."""
    seed: int = 0
    """Of the moments."""
    offload: bool = False
    """In every second case, hidden states wait on disk."""
    directory: Path | None = None
    """Where to work; a temporary one by default. Cases that fail are left there."""


def soak(config: SoakConfig) -> None:
    """A line for each case. Raises WorkError if one fails."""
    flags, directory = f"{FLAGS} {config.flags}", Path(tempfile.mkdtemp(prefix="soak-", dir=config.directory))
    started = time.perf_counter()
    finish(quantization(config.model, flags, directory / "uninterrupted"))
    duration, expected = time.perf_counter() - started, hashes(directory / "uninterrupted")
    print(f"uninterrupted: {duration:.1f} s, {len(expected)} files", flush=True)
    good = 0
    for i in range(config.times):
        chance = random.Random(f"{config.seed} {i}")
        moments = [chance.uniform(0, duration)]
        if chance.random() < 1 / 3:
            moments.append(chance.uniform(0, duration - moments[0]))
        output, states = directory / f"case-{i + 1}", directory / f"states-{i + 1}"
        offload = f" --offload-dir {shlex.quote(str(states))}" if config.offload and i % 2 else ""
        told, wrong = case(quantization(config.model, flags + offload, output), moments, expected)
        if hashes(states):
            wrong.append("hidden states are left on disk")
        good += not wrong
        print(f"{i + 1:3} of {config.times}  {told}: {'; '.join(wrong) or 'same bytes'}", flush=True)
        if not wrong:
            shutil.rmtree(output)
    print(f"{good} of {config.times} end byte-identical", flush=True)
    if good < config.times:
        raise WorkError(f"{config.times - good} cases fail; what they left is in {directory}")
    shutil.rmtree(directory)


def quantization(model: str, flags: str, output: Path, processes: int = 1) -> list[str]:
    """The command, its output last."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    words = [sys.executable, "-m", *(launcher if processes > 1 else []), "llmq.quantize", "--model", model]
    return [*words, *shlex.split(flags), "--output", str(output)]


def resumed(words: list[str]) -> list[str]:
    """The same command with --resume."""
    return [*words[:-2], "--resume", *words[-2:]]


def case(words: list[str], moments: list[float], expected: dict[str, str]) -> tuple[str, list[str]]:
    """Kill a run after so many seconds, then what goes on with it. Returns what happened, and what was wrong."""
    output, told, wrong = Path(words[-1]), list[str](), list[str]()
    for i, moment in enumerate(moments):
        process = subprocess.Popen(resumed(words) if i else words, stderr=subprocess.DEVNULL)
        try:
            if process.wait(moment):
                wrong.append(f"exits with {process.returncode} before it is killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        told.append(f"killed after {moment:5.1f} s with {blocks_finished(output):2} blocks finished")
        found = hashes(output)
        if "config.json" in found and not expected.items() <= found.items():
            wrong.append(f"looks finished after kill {i + 1} but differs in {differing(found, expected)}")
    started = time.perf_counter()
    try:
        finish(resumed(words))
    except WorkError as error:
        wrong.append(str(error))
    told.append(f"resumed in {time.perf_counter() - started:5.1f} s")
    if (found := hashes(output)) != expected:
        wrong.append(f"ends with other bytes in {differing(found, expected)}")
    return ", ".join(told), wrong


def finish(words: list[str]) -> None:
    """Run a command to its end. Raises WorkError with what it said last unless it exits with 0."""
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise WorkError(f"{shlex.join(words)} exits with {done.returncode}: {said}")


def hashes(output: Path) -> dict[str, str]:
    """SHA-256 of each file, but of those that tell when and how fast it was made."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name not in (REPORT, PROGRESS))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of the files that are not the same in both."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def blocks_finished(output: Path) -> int:
    """So far, in a run that goes on or was interrupted."""
    return sum(step.finished["finished"][-1].isdigit() for step in read_journal(output / PROGRESS)[1])


if __name__ == "__main__":
    run(SoakConfig, soak)
