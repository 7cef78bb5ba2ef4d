"""Everything docs/scale.md says, measured, and whether it holds: a line per claim.

    python scripts/check_scale.py --model-7b model-7b
    python scripts/check_scale.py --only two-processes

Measurements that are in --results already are not made again (after a change to the code, delete those it concerns):
from none it takes some two hours on 2 cores. Seconds and memory mean something only if the machine has nothing else to
do. Memory is what the system says of the process every few milliseconds, or its own report, whichever is more.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from interruptions import STOPS, dead_process, interrupted
from make_model import MakeConfig, make_model
from soak import differing, finish, hashes, quantization

from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.cli import run
from llmq.core.device import cores
from llmq.core.errors import WorkError
from llmq.core.settings import one_of

Row = dict[str, Any]

_RTN = "--method rtn --grid minmax --bits 4"
_GPTQ = "--calibration pydoc --samples 8 --sequence-length 512 --blocks 0-2"
_DEMO = "--calibration pydoc --samples 32 --sequence-length 512 --group-size 64"
# On a model for tests, with text enough for a run that can be met on its way.
SMALL = "--calibration pydoc --samples 64 --sequence-length 256 --group-size 64"
_KILLS = "--times 20 --offload"
_DISK_TRIAL = 1 << 30  # bytes
_EARLY, _LATE = "model.layers.2", "model.layers.29"


@dataclass(frozen=True)
class ScaleConfig:
    """Check what docs/scale.md says."""

    model_7b: Path = Path("model-7b")
    """A model of the shape of Llama 2 7B; made (13.5 GB) if it is not there."""
    results: Path = Path("docs/benchmarks/scale.jsonl")
    """Finished measurements, one JSON object each."""
    directory: Path | None = None
    """Where to work, on a disk with 10 GB; a temporary directory by default."""
    only: str = ""
    """One measurement: rtn-7b, gptq-7b, flat, two-processes, kills, interruptions or dead-rank."""


def check(config: ScaleConfig) -> None:
    """Make the missing measurements and print the claims. Raises WorkError if one does not hold."""
    if config.only:
        one_of("only", config.only, tuple(_MEASUREMENTS))
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    rows = {row["measurement"]: row for row in map(json.loads, lines)}
    for name in (wanted := [name for name in _MEASUREMENTS if config.only in ("", name)]):
        if name not in rows:
            with tempfile.TemporaryDirectory(prefix="scale-", dir=config.directory) as room:
                row = {"measurement": name, "date": str(date.today()), "machine": machine()}
                rows[name] = row | _MEASUREMENTS[name](config, Path(room))
            with config.results.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
    told = [claim for name in wanted for claim in claims(name, rows[name])]
    for what, measured, bar, command in told:  # a measurement that is no number does not hold
        print(f"{'holds' if measured <= bar else 'FAILS'}  {measured:8.3f} <= {bar:<8.4g} {what}: {command}")
    if failed := sum(not measured <= bar for _, measured, bar, _ in told):
        raise WorkError(f"{failed} claims do not hold")


def claims(name: str, row: Row) -> Iterator[tuple[str, float, float, str]]:
    """What is claimed, what was measured, what it may be at most, and the command."""
    quantize = "python -m llmq.quantize --model"
    if name == "rtn-7b":
        yield "GB of memory, 7B, rtn", row["peak_bytes"] / 1e9, 2.5, f"{quantize} model-7b {_RTN}"
        bar = max(240.0, row["disk_seconds"])
        yield f"seconds ({row['disk_seconds']:.0f} for the disk alone)", row["seconds"], bar, "the same"
        yield "memory in block 30 / in block 3", row["late_bytes"] / row["early_bytes"], 1.03, "the same"
    elif name == "gptq-7b":
        yield "GB of memory, 7B, gptq", row["peak_bytes"] / 1e9, 4.0, f"{quantize} model-7b {_GPTQ}"
    elif name == "flat":
        ratio = row["late_bytes"] / row["early_bytes"]
        yield "memory in block 30 / in block 3 of the demo model", ratio, 1.03, f"{quantize} demo {_DEMO}"
    elif name == "two-processes":
        command = f"torchrun --nproc-per-node 2 -m llmq.quantize --model demo {_DEMO}"
        yield "files that two processes write otherwise than one", len(row["differing"]), 0, command
        yield "seconds, two processes / one", median(row["two_seconds"]) / median(row["one_seconds"]), 1.1, "the same"
    elif name == "kills":
        what = f"of {row['cases']} killed runs, those that end in other bytes"
        yield what, row["cases"] - row["identical"], 0, f"python scripts/soak.py {_KILLS}"
    else:
        for how, wrong in row["wrong"].items():
            what = f"complaints about a run that ends by {how}" + "".join(f"; {each}" for each in wrong)
            yield what, len(wrong), 0, f"python scripts/check_scale.py --only {name}"
    if name == "dead-rank":
        yield "seconds until all processes have ended", max(row["seconds"]), 60, "the same"


def machine() -> str:
    """What the numbers depend on."""
    return f"{platform.system()} {platform.machine()}, {cores()} cores"


def measured(words: list[str]) -> Row:
    """Run llmq.quantize: how long it took, and its memory as seen from outside and from inside."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stderr=said)
        while process.poll() is None:
            # Not ru_maxrss: llmq resets the mark that it is taken from, to tell one block's memory from the next.
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, 1024 * int(found[1])) if found else peak
            time.sleep(0.02)
        said.seek(0)
        if process.returncode:
            last = (said.read().strip().splitlines() or ["without a word"])[-1]
            raise WorkError(f"{shlex.join(words)} failed: {last}")
    report = json.loads((Path(words[-1]) / REPORT).read_text())
    row = {"seconds": time.perf_counter() - started, "phases": report["seconds"], "outside_bytes": peak}
    return row | {"peak_bytes": max(peak, report["peak_memory_bytes"])}


def _rtn_7b(config: ScaleConfig, room: Path) -> Row:
    row = measured(quantization(_model_7b(config), _RTN, room / "out"))
    model, made = (sum(path.stat().st_size for path in at.glob("*.safe*")) for at in (config.model_7b, room / "out"))
    read_speed, write_speed = disk_speed(room)
    # The result is written in parts, which become shards, which are read back.
    row |= memory_of_blocks(room / "out", _EARLY, _LATE)
    return row | {"disk_seconds": (model + 2 * made) / read_speed + 2 * made / write_speed}


def _gptq_7b(config: ScaleConfig, room: Path) -> Row:
    return measured(quantization(_model_7b(config), _GPTQ, room / "out"))


def _model_7b(config: ScaleConfig) -> str:
    if not config.model_7b.exists():
        make_model(MakeConfig(config.model_7b))
    return str(config.model_7b)


def disk_speed(directory: Path) -> tuple[float, float]:
    """Bytes a second, read and written, past the system's cache."""
    part, path = os.urandom(1 << 24), directory / "trial"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(_DISK_TRIAL // len(part)):
            file.write(part)
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(len(part)):
            pass
    read = time.perf_counter() - started
    path.unlink()
    return _DISK_TRIAL / read, _DISK_TRIAL / written


def _flat(_: ScaleConfig, room: Path) -> Row:
    return measured(quantization("demo", _DEMO, room / "out")) | memory_of_blocks(room / "out", _EARLY, _LATE)


def memory_of_blocks(output: Path, early: str, late: str) -> Row:
    """The peak while each of two blocks was quantized."""
    lines = map(json.loads, (output / PROGRESS).read_text().splitlines())
    peaks = [(line["block"], line["peak_memory_bytes"]) for line in lines if "block" in line]
    first, last = (max(peak for block, peak in peaks if block == each) for each in (early, late))
    return {"early_bytes": first, "late_bytes": last}


def _two_processes(_: ScaleConfig, room: Path) -> Row:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    others: list[str] = []
    for i in range(3):
        for count in (1, 2):  # taking turns: a machine that slows down slows both
            output = room / f"{i}-{count}"
            started = time.perf_counter()
            finish(quantization("demo", _DEMO, output, count))
            seconds[count].append(time.perf_counter() - started)
            others += differing(hashes(output), hashes(room / "0-1"))
    return {"one_seconds": seconds[1], "two_seconds": seconds[2], "differing": others}


def _kills(config: ScaleConfig, _: Path) -> Row:
    where = ["--directory", str(config.directory)] if config.directory else []  # which is kept if a case fails
    words = [sys.executable, str(Path(__file__).with_name("soak.py")), *shlex.split(_KILLS), *where]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for last in process.stdout:
        print(last, end="", file=sys.stderr, flush=True)
    process.wait()
    found = re.match(r"(\d+) of (\d+) end byte-identical", last)
    if found is None:
        raise WorkError(f"{shlex.join(words)} failed")
    return {"identical": int(found[1]), "cases": int(found[2])}


def _interruptions(_: ScaleConfig, room: Path) -> Row:
    model, expected = _tiny(room)
    outputs = {how: room / f"out-{i}" for i, how in enumerate(STOPS)}
    return {"wrong": {how: interrupted(quantization(model, SMALL, at), how, expected) for how, at in outputs.items()}}


def _dead_rank(_: ScaleConfig, room: Path) -> Row:
    model, expected = _tiny(room)
    ends = [dead_process(quantization(model, SMALL, room / f"out-{i}", 2), i, expected) for i in (0, 1)]
    wrong = {f"the death of process {i}": each for i, (_, each) in enumerate(ends)}
    return {"wrong": wrong, "seconds": [seconds for seconds, _ in ends]}


def _tiny(room: Path) -> tuple[str, dict[str, str]]:
    """A model for tests, and the files of a run on it that nothing interrupts."""
    make_model(MakeConfig(room / "model", shape="tiny", blocks=4))
    finish(quantization(str(room / "model"), SMALL, room / "uninterrupted"))
    return str(room / "model"), hashes(room / "uninterrupted")


_MEASUREMENTS: dict[str, Callable[[ScaleConfig, Path], Row]] = {
    "rtn-7b": _rtn_7b,
    "gptq-7b": _gptq_7b,
    "flat": _flat,
    "two-processes": _two_processes,
    "kills": _kills,
    "interruptions": _interruptions,
    "dead-rank": _dead_rank,
}


if __name__ == "__main__":
    run(ScaleConfig, check)
