"""Compare quantizing after training (PTQ) with training while quantized (QAT): KL, perplexity, seconds, memory, tokens.

A way is a name, a program of llmq and its flags. Each row runs in its own process and is written at once. A second call
with the same --results measures only the missing rows. With --own, the model first writes texts of its own, which are
trained on beside the calibration text.

    python scripts/compare_ptq_qat.py --model demo-dithered --calibration valid.txt --text test.txt --own 512 \\
        --bits 4 2 --ways "gptq: quantize" "qat: train --learn codes --loss kl --steps 1000" --plot qat.png
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_methods import Row, earlier_rows

import llmq
from llmq.calibration.texts import evaluation_chunks, read_text
from llmq.checkpoint.output_dir import REPORT
from llmq.cli import run
from llmq.core.errors import RequestError, WorkError
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score
from llmq.runtime.load import load_any
from llmq.runtime.own_texts import WriteConfig, write_texts

PROGRAMS = ("quantize", "train")
WAYS = (
    "rtn: quantize --method rtn",
    "gptq: quantize",
    "tuned: quantize --method tuned",
    "qat scales: train --learn scales --loss kl --steps 200",
    "qat codes: train --learn codes --loss kl --steps 200",
)


@dataclass(frozen=True)
class CompareConfig:
    """Quantize one model in several ways, with and without training, and compare the results with the original."""

    model: str
    """Directory, hub id, .gguf file, or demo for the demo model."""
    calibration: str = "pydoc"
    """Text to calibrate and to train on."""
    text: str = "pytopics"
    """Text to evaluate on; it should share nothing with the other one."""
    ways: tuple[str, ...] = WAYS
    """What to compare. Each is 'NAME: PROGRAM FLAGS'; the program is quantize or train. --data FILES among the flags
    replaces what else is trained on."""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Bits per weight."""
    group_size: int = 64
    """Weights that share a scale."""
    own: int = 0
    """Texts of 256 tokens that the model writes itself, to train on beside the calibration text."""
    batch: int = 2
    """Sequences of a training step."""
    samples: int = 64
    """Calibration sequences."""
    sequence_length: int = 512
    """Tokens per calibration sequence and per sequence to train on."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int | None = 20
    """Number of evaluation chunks."""
    results: Path = Path("compare_ptq_qat.jsonl")
    """File of finished rows, one JSON object per line. The model's own texts lie beside it."""
    outputs: Path | None = None
    """Directory where the checkpoints stay. A row that was interrupted goes on from what it holds; its seconds are then
    those of the last call."""
    plot: Path | None = None
    """File for a picture of KL against bits, one line for each way in --results (needs matplotlib)."""


def compare(config: CompareConfig) -> None:
    """Measure the missing rows, then print the table in Markdown."""
    print(*table(rows_of(config)), sep="\n")
    if config.plot is not None:
        plot(config.plot, list(finished(config, commands_of(config.ways)).values()))


def rows_of(config: CompareConfig) -> list[Row]:
    """Return the rows in the order of the table. Rows that --results lacks are measured and added to it."""
    commands = commands_of(config.ways)
    rows = finished(config, commands)
    keys = [(name, bits) for bits in config.bits for name in commands]
    if missing := [key for key in keys if key not in rows]:
        own = _own_texts(config)
        model, tokenizer = load_any(config.model, "cpu")
        chunks = evaluation_chunks(tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit)
        reference = remembered(logits_of(model), chunks)
        del model
        original = score(reference, chunks).perplexity
        for name, bits in missing:
            row = _row(config, (name, bits, commands[name]), own, lambda made: evaluate(made, chunks, reference))
            rows[name, bits] = row | {"original_perplexity": original}
            with config.results.open("a") as file:
                file.write(json.dumps(rows[name, bits]) + "\n")
            print(_line(rows[name, bits]), file=sys.stderr, flush=True)
    return [rows[key] for key in keys]


def commands_of(ways: Sequence[str]) -> dict[str, str]:
    """Return the program and flags of each way by its name. Raises RequestError for one that is not valid."""
    commands: dict[str, str] = {}
    for way in ways:
        name, colon, command = (piece.strip() for piece in way.partition(":"))
        if not colon or name in commands or command.partition(" ")[0] not in PROGRAMS:
            raise RequestError(f"a way is 'NAME: PROGRAM FLAGS' with program quantize or train; got {way!r}")
        commands[name] = command
    return commands


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"original perplexity {rows[0]['original_perplexity']:.3f}\n"
    yield "| bits | way | KL | perplexity | seconds | tokens seen | peak memory |"
    yield "|---|---|---|---|---|---|---|"
    yield from map(_line, rows)


def _line(row: Row) -> str:
    measured = f"{row['kl']:.4f} | {row['perplexity']:.3f} | {row['seconds']:.0f} | {row['tokens']:,}"
    return f"| {row['bits']} | {row['name']} | {measured} | {row['peak_memory_bytes'] / 1e9:.2f} GB |"


def _own_texts(config: CompareConfig) -> Path | None:
    """Return a file of texts that the model wrote; None if none are wanted."""
    if not config.own:
        return None
    path = config.results.with_name(f"{config.results.stem}-own-{config.own}.jsonl")
    if not path.exists():
        write_texts(WriteConfig(config.model, path, config.own, device="cpu"), progress=True)
    return path


def _row(config: CompareConfig, what: tuple[str, int, str], own: Path | None, measure: Any) -> Row:
    name, bits, way = what
    program, *flags = shlex.split(way)
    with nullcontext(config.outputs) if config.outputs else tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / (re.sub(r"\W+", "-", name) + f"-{bits}bit")
        output.parent.mkdir(parents=True, exist_ok=True)
        command = ["--model", config.model, "--output", str(output)]
        command += ["--bits", str(bits), "--group-size", str(config.group_size), "--calibration", config.calibration]
        command += ["--sequence-length", str(config.sequence_length)]
        if program == "quantize":
            command += ["--samples", str(config.samples), "--format", "compressed-tensors"]
        else:
            command += ["--calibration-samples", str(config.samples), "--batch", str(config.batch)]
            command += ["--micro-batch", str(config.batch)]
            if "--data" not in flags:
                command += ["--data", config.calibration, *([] if own is None else [str(own)])]
        report = report_of(program, output, [*command, "--resume", *flags])
        result = measure(llmq.load(output, device="cpu"))
    row = {"settings": common(config), "name": name, "command": way, "bits": bits}
    row |= {"kl": result.kl, "perplexity": result.perplexity, "seconds": report["seconds"]["total"]}
    row |= {"trained": report.get("trained"), "peak_memory_bytes": report["peak_memory_bytes"]}
    return row | {"tokens": _tokens(config, report, way)}


def report_of(program: str, output: Path, flags: Sequence[str]) -> Row:
    """Run a program of llmq that writes into `output`; return its report. Raises WorkError if it fails."""
    command = [sys.executable, "-m", f"llmq.{program}", *flags]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise WorkError(f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((output / REPORT).read_text())


def _tokens(config: CompareConfig, report: Row, way: str) -> int:
    """Return how many tokens of text a run has seen in its training, or if it had none, in its calibration."""
    if "trained" in report:
        return report["trained"]["tokens_seen"]
    if "rtn" in way:
        return 0
    settings, seen = report["config"], config.samples * config.sequence_length
    steps = settings["tuned"]["end_steps"] * settings["tuned"]["end_batch"] * config.sequence_length
    return seen + (steps if settings["method"] == "tuned" else 0)


def finished(config: CompareConfig, commands: dict[str, str]) -> dict[tuple[str, int], Row]:
    """Return the rows of earlier calls. Raises RequestError if their texts, sizes or commands were other ones."""
    rows = earlier_rows(config.results, common(config), "command", commands)
    return {(row["name"], row["bits"]): row for row in rows}


def common(config: CompareConfig) -> Row:
    """Return the settings that all rows of one table share."""
    files = {name: Path(getattr(config, name)).name for name in ("model", "calibration", "text")}
    sizes = ("group_size", "own", "batch", "samples", "sequence_length", "chunk", "limit")
    return files | {name: getattr(config, name) for name in sizes}


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw KL against bits, one line for each way."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        marker = "osD"[i // 10 % 3]  # the ten colours begin again then
        points = sorted((row["bits"], row["kl"]) for row in rows if row["name"] == name)
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.set(xlabel="bits per weight", ylabel="KL divergence from the original (nats per token)", yscale="log")
    widths = sorted({row["bits"] for row in rows})
    axes.set_xscale("log")  # or half of the picture would lie between 4 and 8 bits
    axes.set_xticks(widths, labels=map(str, widths))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)  # it would hide lines
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    run(CompareConfig, compare)
