"""Compare settings of llmq on one model: all combinations of settings, bits, group sizes and seeds, in one table.

For each row, `python -m llmq.quantize` runs in its own process, so that the memory of each run can be measured. Then
the checkpoint is loaded and evaluated. Finished rows are written at once. A second call with the same --results
measures only the missing rows. A setting is a name and flags of llmq.quantize. A seed chooses the windows of the
calibration text.

    python scripts/compare_methods.py --model demo-dithered --calibration valid.txt --text test.txt \\
        --settings "fast: --effort fast" "normal:" "awq: --method awq" --bits 4 3 --seeds 0 1 2 --plot kl.png
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import llmq
from llmq.calibration.texts import evaluation_chunks, read_text
from llmq.checkpoint.describe import describe
from llmq.checkpoint.output_dir import REPORT
from llmq.cli import run
from llmq.core.errors import RequestError, WorkError
from llmq.runtime.evaluation import Logits, evaluate, logits_of, remembered, score
from llmq.runtime.load import load_any

Row = dict[str, Any]
Key = tuple[str, int, int, int]
DEFAULT = ("rtn: --method rtn", "gptq fast: --effort fast", "gptq: --method gptq", "awq: --method awq")
_PHASES = ("sample", "forward", "statistics", "solve", "refine", "distill")


@dataclass(frozen=True)
class CompareConfig:
    """Quantize one model in many ways and compare the results with the original."""

    model: str
    """Directory, hub id, .gguf file, or demo for the demo model."""
    calibration: str = "pydoc"
    """Text to calibrate on."""
    text: str = "pytopics"
    """Text to evaluate on; it should share nothing with the calibration text."""
    settings: tuple[str, ...] = DEFAULT
    """Settings to compare. Each is 'NAME: FLAGS' with flags of llmq.quantize."""
    bits: tuple[int, ...] = (4, 3, 2)
    """Bits per weight to compare."""
    group_sizes: tuple[int, ...] = (64,)
    """Group sizes to compare, in weights."""
    seeds: tuple[int, ...] = (0,)
    """Seeds for choosing the calibration windows; the table shows means over them."""
    samples: int = 64
    """Calibration sequences."""
    sequence_length: int = 512
    """Tokens per calibration sequence."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int | None = 20
    """Number of evaluation chunks."""
    results: Path = Path("compare_methods.jsonl")
    """File of finished rows, one JSON object per line."""
    csv: Path | None = None
    """File to write the rows to for spreadsheets."""
    plot: Path | None = None
    """File for a picture of KL divergence against bits per weight, one line per setting (needs matplotlib)."""


def compare(config: CompareConfig) -> None:
    """Measure the missing rows, then print the table in Markdown."""
    rows = rows_of(config)
    print(*table(config, rows), sep="\n")
    if config.csv is not None:
        _write_csv(config.csv, rows)
    if config.plot is not None:
        plot(config.plot, rows)


def rows_of(config: CompareConfig) -> list[Row]:
    """Return the rows in the order of the table. Rows that --results lacks are measured and added to it."""
    flags = _flags(config.settings)
    rows = finished(config, flags)
    # All settings with the first seed come first: so a whole table is there early.
    order = product(config.seeds, config.bits, config.group_sizes, flags)
    missing = [key for seed, bits, size, name in order if (key := (name, bits, size, seed)) not in rows]
    if missing:
        model, tokenizer = load_any(config.model, "cpu")
        chunks = evaluation_chunks(tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit)
        reference = remembered(logits_of(model), chunks)
        del model
        original = score(reference, chunks).perplexity
        for key in missing:
            rows[key] = _row(config, key, flags[key[0]], chunks, reference) | {"original_perplexity": original}
            with config.results.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
            print(*_lines([rows[key]]), sep="\n", file=sys.stderr, flush=True)
    order = product(config.bits, config.group_sizes, flags, config.seeds)
    return [rows[name, bits, size, seed] for bits, size, name, seed in order]


def table(config: CompareConfig, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    original = f"original perplexity {rows[0]['original_perplexity']:.3f}"
    yield f"{config.samples}x{config.sequence_length} tokens; {original}\n"
    yield "| bits | group | setting | KL | perplexity | layer error | seconds | of which | peak memory |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from _lines(rows)


def _flags(settings: Sequence[str]) -> dict[str, str]:
    """Return the flags of each setting by its name. Raises RequestError if a setting is not valid."""
    flags: dict[str, str] = {}
    for setting in settings:
        name, colon, text = (piece.strip() for piece in setting.partition(":"))
        if not colon or name in flags:
            raise RequestError(f"a setting must be 'NAME: FLAGS', and each name may occur once; got {setting!r}")
        if taken := {"--bits", "--group-size", "--seed"} & {word.partition("=")[0] for word in text.split()}:
            raise RequestError(
                f"setting {name!r} must not contain {' '.join(taken)}; use --bits, --group-sizes or --seeds instead"
            )
        flags[name] = text
    return flags


def _row(config: CompareConfig, key: Key, flags: str, chunks: torch.Tensor, reference: Logits) -> Row:
    name, bits, size, seed = key
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "model"
        command = [sys.executable, "-m", "llmq.quantize", "--model", config.model, "--output", str(output)]
        command += ["--bits", str(bits), "--group-size", str(size), "--seed", str(seed)]
        command += ["--format", "compressed-tensors", "--calibration", config.calibration]
        command += ["--samples", str(config.samples), "--sequence-length", str(config.sequence_length)]
        command += shlex.split(flags)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        report = json.loads((output / REPORT).read_text())
        result = evaluate(llmq.load(output, device="cpu"), chunks, reference)
        packed = describe(output)
    row = {"settings": common(config), "name": name, "flags": flags, "bits": bits, "group_size": size, "seed": seed}
    row |= {"bits_per_weight": packed["bits_per_packed_weight"], "packed_weights": packed["packed_weights"]}
    row |= {"perplexity": result.perplexity, "kl": result.kl}
    if budget := report.get("budget"):
        row |= {"budget": {name: budget.get(name) for name in ("stored_bits", "predicted_kl", "measured_kl")}}
    # The geometric mean: layers with a small error count as much as others.
    row |= {"layer_error": math.exp(mean(math.log(max(entry["error"], 1e-12)) for entry in report["groups"]))}
    return row | {"seconds": report["seconds"], "peak_memory_bytes": report["peak_memory_bytes"]}


def finished(config: CompareConfig, flags: dict[str, str]) -> dict[Key, Row]:
    """Return the rows of earlier calls. Raises RequestError if their texts, sizes or flags were other ones."""
    rows = earlier_rows(config.results, common(config), "flags", flags)
    return {(row["name"], row["bits"], row["group_size"], row["seed"]): row for row in rows}


def earlier_rows(results: Path, settings: Row, what: str, given: dict[str, str]) -> list[Row]:
    """Return the rows of a file. Raises RequestError unless they have these settings, and by name these flags.

    `what`: the name of the flags in a row.
    """
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in rows:
        if row["settings"] != settings or given.get(row["name"], row[what]) != row[what]:
            raise RequestError(f"{results} contains rows made with other settings; name another file with --results")
    return rows


def common(config: CompareConfig) -> Row:
    """Return the settings that all rows of one table share."""
    files = {name: Path(getattr(config, name)).name for name in ("model", "calibration", "text")}
    return files | {name: getattr(config, name) for name in ("samples", "sequence_length", "chunk", "limit")}


def _grouped(rows: Sequence[Row]) -> dict[tuple[int, int, str], list[Row]]:
    """Group the rows that differ only in their seed."""
    groups: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["group_size"], row["name"]), []).append(row)
    return groups


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line for each group of rows: means over seeds, and the largest deviation from the mean."""
    for (bits, size, name), same in _grouped(rows).items():
        seconds = {phase: mean(row["seconds"].get(phase, 0.0) for row in same) for phase in ("total", *_PHASES)}
        phases = ", ".join(f"{phase} {seconds[phase]:.0f}" for phase in _PHASES if seconds[phase] >= 0.5)
        yield (
            f"| {bits} | {size} | {name} | {_spread(same, 'kl', 4)} | {_spread(same, 'perplexity', 3)} "
            f"| {mean(row['layer_error'] for row in same):.2e} | {seconds['total']:.0f} | {phases} "
            f"| {max(row['peak_memory_bytes'] for row in same) / 1e9:.2f} GB |"
        )


def _spread(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows]
    middle = mean(values)
    largest = max(abs(value - middle) for value in values)
    return f"{middle:.{digits}f}" + (f" ± {largest:.{digits}f}" if len(values) > 1 else "")


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    plain = [{k: v for k, v in row.items() if not isinstance(v, dict)} | row["seconds"] for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in plain for name in row)))
        writer.writeheader()
        writer.writerows(plain)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw KL divergence against bits per weight, one line for each setting."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for (_, _, name), same in _grouped(rows).items():
        lines.setdefault(name, []).append((same[0]["bits_per_weight"], mean(row["kl"] for row in same)))
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.5, label=name)
    axes.set(xlabel="bits per weight, scales included", ylabel="KL divergence from the original (nats per token)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    run(CompareConfig, compare)
