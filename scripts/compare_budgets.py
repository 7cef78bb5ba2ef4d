"""Compare `--budget` with uniform bits: KL at the same stored bits, and predicted KL against measured.

Uniform bits are measured at each number of --bits. Between two of them, the KL of "uniform bits at this size" is read
off the straight line through both on a log scale. Runs are those of compare_methods.py, with the same --results.

    python scripts/compare_budgets.py --model demo-dithered --calibration valid.txt --text test.txt --budgets 3.25 3.5 4
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from compare_methods import CompareConfig, Row, rows_of

from llmq.cli import run
from llmq.core.errors import RequestError

_UNIFORM = "uniform"
_BEYOND = 0.02  # stored bits: a budget is not spent to the last bit, and then the line goes on a little


@dataclass(frozen=True)
class BudgetsConfig:
    """Quantize one model with uniform bits and with budgets, and compare both with the original."""

    model: str
    """Directory, hub id, .gguf file, or demo for the demo model."""
    calibration: str = "pydoc"
    """Text to calibrate on."""
    text: str = "pytopics"
    """Text to evaluate on; it should share nothing with the calibration text."""
    budgets: tuple[float, ...] = (3.25, 3.5, 4.0)
    """Stored bits per weight on average."""
    bits: tuple[int, ...] = (3, 4)
    """Uniform bits to compare with, from the fewest. All budgets must lie between what they store."""
    flags: str = ""
    """More flags of llmq.quantize, for all runs."""
    group_size: int = 64
    """Weights that share a scale."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds for choosing the calibration windows; the table shows medians over them."""
    samples: int = 64
    """Calibration sequences."""
    sequence_length: int = 512
    """Tokens per calibration sequence."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int | None = 20
    """Number of evaluation chunks."""
    results: Path = Path("compare_budgets.jsonl")
    """File of finished rows, one JSON object per line. A second call measures only what it lacks."""

    def methods(self, settings: tuple[str, ...], bits: tuple[int, ...]) -> CompareConfig:
        """Return the request for some of the rows."""
        return CompareConfig(
            self.model,
            calibration=self.calibration,
            text=self.text,
            settings=settings,
            bits=bits,
            group_sizes=(self.group_size,),
            seeds=self.seeds,
            samples=self.samples,
            sequence_length=self.sequence_length,
            chunk=self.chunk,
            limit=self.limit,
            results=self.results,
        )


def compare(config: BudgetsConfig) -> None:
    """Measure the missing rows, then print the table in Markdown."""
    uniform = rows_of(config.methods((f"{_UNIFORM}: {config.flags}",), config.bits))
    budgets = tuple(f"budget {each:g}: --budget {each:g} {config.flags}".strip() for each in config.budgets)
    print(*table(uniform, rows_of(config.methods(budgets, (4,)))), sep="\n")


def table(uniform: Sequence[Row], budgets: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown: medians over the seeds."""
    yield "| run | stored bits | KL | uniform bits at this size | ratio | predicted / measured, held out | seconds |"
    yield "|---|---|---|---|---|---|---|"
    points = sorted((_median(rows, "bits_per_weight"), _median(rows, "kl")) for rows in _alike(uniform))
    for rows in (*_alike(uniform), *_alike(budgets)):
        stored, kl = _median(rows, "bits_per_weight"), _median(rows, "kl")
        name = rows[0]["name"] if rows[0]["name"] != _UNIFORM else f"{rows[0]['bits']} bit"
        line = f"| {name} | {stored:.3f} | {kl:.4f} "
        if rows[0].get("budget"):
            between = interpolated(points, stored)
            told = [row["budget"]["predicted_kl"] / row["budget"]["measured_kl"] for row in rows]
            line += f"| {between:.4f} | {kl / between:.3f} | {median(told):.2f} "
        else:
            line += "| | | "
        yield line + f"| {median(row['seconds']['total'] for row in rows):.0f} |"


def interpolated(points: Sequence[tuple[float, float]], stored: float) -> float:
    """Return the KL at so many stored bits, on a log scale between the nearest points. Raises RequestError outside."""
    for (low, kl_low), (high, kl_high) in pairwise(points):
        if low - _BEYOND <= stored <= high + _BEYOND:
            share = (stored - low) / (high - low)
            return math.exp((1 - share) * math.log(kl_low) + share * math.log(kl_high))
    raise RequestError(
        f"uniform bits store {points[0][0]:.3f} to {points[-1][0]:.3f} bits; got a budget of {stored:.3f}"
    )


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that differ only in their seed."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["bits"]), []).append(row)
    return list(groups.values())


def _median(rows: Sequence[Row], name: str) -> float:
    return median(row[name] for row in rows)


if __name__ == "__main__":
    run(BudgetsConfig, compare)
