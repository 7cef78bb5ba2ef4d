"""Check everything that docs/accuracy.md says: measure what is missing, print the tables and one line per claim.

    python scripts/check_accuracy.py --calibration wikitext2-valid.txt --text wikitext2-test.txt

Rows that are already in --results are not measured again. After a change to the code, delete the rows that it affects.
Without any rows, the script takes about ten hours on 2 cores. Seconds and memory are only meaningful if the machine
does nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from compare_methods import CompareConfig, Row, plot, rows_of, table
from dither import DitherConfig, write_dithered

from llmq.cli import run
from llmq.core.errors import WorkError

_COMMON, _FAST, _NORMAL = "common: --effort fast --grid common", "fast: --effort fast", "normal: --effort normal"
_BEST, _TUNED = "best: --effort best", "tuned: --method tuned"
# GPTQ as other tools ship it, and the same with one improvement of `normal` added.
_PLAIN = "--gptq.order natural --gptq.damping 0.01"
_ALONE = (
    f"plain: --effort fast --grid common {_PLAIN}",
    f"plain + full-range scale: --effort fast --grid minmax {_PLAIN}",
    f"plain + searched grid: --effort fast {_PLAIN}",
    "plain + group order: --effort fast --grid common --gptq.damping 0.01",
    "plain + damping 0.05: --effort fast --grid common --gptq.order natural",
    f"plain + sequential: --grid common --without match {_PLAIN}",
    f"plain + sequential, matching: --grid common {_PLAIN}",
)
_OFF = (
    "normal - searched grid: --grid minmax",
    "normal - group order: --gptq.order natural",
    "normal - damping 0.05: --gptq.damping 0.01",
    "normal - matching: --without match",
    "normal - sequential, matching: --without match sequential",
)
_OPTIONS = (
    "normal, mse grid: --grid mse",
    "normal, static order: --gptq.order static",
    "normal, awq first: --method awq+gptq",
)
# Two passes help, but the solve takes three times as long: only `best` has them.
_TWICE = "normal, 2 passes: --gptq.passes 2"
_PARTS = (*_ALONE, _NORMAL, *_OFF, *_OPTIONS, _TWICE)


@dataclass(frozen=True)
class CheckConfig:
    """Check the numbers and claims of docs/accuracy.md."""

    calibration: str
    """Text to calibrate on: the validation split of wikitext2 as a .txt file."""
    text: str
    """Text to evaluate on: the test split of wikitext2 as a .txt file."""
    results: Path = Path("docs/benchmarks")
    """Directory of finished rows. Tables share a file if only their settings, bits and seeds differ."""
    dithered: Path = Path("demo-dithered")
    """The dithered demo model (see dither.py); made if it is missing."""
    plot: Path | None = None
    """File for a picture of the main table; without it none is drawn."""


def check(config: CheckConfig) -> None:
    """Print tables and claims. Raises WorkError if a claim does not hold."""
    if not config.dithered.exists():
        write_dithered(DitherConfig(config.dithered))
    tables = {name: (comparison, rows_of(comparison)) for name, comparison in _tables(config).items()}
    for name, (comparison, rows) in tables.items():
        print(f"\n{name}\n", *table(comparison, rows), sep="\n")
    if config.plot is not None:
        plot(config.plot, tables["main"][1])
    print()
    failed = 0
    for what, measured, bar in _claims({name: Rows(rows) for name, (_, rows) in tables.items()}):
        holds = measured <= bar  # false for NaN
        failed += not holds
        print(f"{'holds' if holds else 'FAILS'}  {measured:8.3f} <= {bar:<8g} {what}")
    if failed:
        raise WorkError(f"{failed} claims do not hold")


def _tables(config: CheckConfig) -> dict[str, CompareConfig]:
    def file(name: str) -> Path:
        return config.results / f"accuracy-{name}.jsonl"

    main = CompareConfig(str(config.dithered), config.calibration, config.text, results=file("main"))
    main = replace(main, settings=(_COMMON, _FAST, _NORMAL, _BEST))
    few = replace(main, limit=8)
    normal = replace(main, settings=(_NORMAL,), bits=(4, 2))
    demo = replace(main, model="demo", limit=4, bits=(4, 3), results=file("demo"))
    return {
        "demo": replace(demo, settings=(_FAST, _NORMAL, _BEST, _TUNED)),
        "main": main,
        "spread": replace(main, settings=(_COMMON, _NORMAL), seeds=(0, 1, 2)),  # the rows of seed 0 are those of main
        "tuned": replace(main, settings=(_TUNED,), bits=(2,)),
        "parts": replace(few, settings=_PARTS, bits=(4, 3), results=file("parts")),
        "documentation": replace(few, calibration="pydoc", text="pytopics", results=file("pydoc")),
        "own text": replace(normal, calibration="self", results=file("self")),
        "pydoc, on wikitext2": replace(normal, calibration="pydoc", results=file("cross")),
    }


class Rows:
    """The rows of one table, and the numbers that claims need from them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def of(self, name: str, bits: int) -> list[Row]:
        """Return the rows of a setting, one for each seed. Only the name before the colon counts."""
        return [row for row in self.rows if row["name"] == name.partition(":")[0] and row["bits"] == bits]

    def kl(self, name: str, bits: int) -> float:
        """Return the mean KL divergence over seeds."""
        return mean(row["kl"] for row in self.of(name, bits))

    def gain(self, name: str, than: str) -> float:
        """Return KL of the setting `than` divided by KL of the setting `name`: the geometric mean over bits."""
        bits = sorted({row["bits"] for row in self.rows})
        return math.exp(mean(math.log(self.kl(than, b) / self.kl(name, b)) for b in bits))


def _claims(tables: dict[str, Rows]) -> Iterator[tuple[str, float, float]]:
    """Yield (claim, measured value, largest allowed value)."""
    demo, main, spread, tuned, parts = (tables[name] for name in ("demo", "main", "spread", "tuned", "parts"))
    for name, bits, bar in (
        (_NORMAL, 4, 0.12),
        (_BEST, 4, 0.108),
        (_TUNED, 4, 0.09),
        (_NORMAL, 3, 0.5),
        (_TUNED, 3, 0.36),
    ):
        yield f"KL of the demo model, {bits} bit, {name}", demo.kl(name, bits), bar
    fast, normal, learned = (demo.of(name, 4)[0] for name in (_FAST, _NORMAL, _TUNED))
    seconds, unavoidable = normal["seconds"]["total"], fast["seconds"]["forward"] + fast["seconds"]["statistics"]
    yield "seconds, demo model, 4 bit, fast", fast["seconds"]["total"], 160
    yield "seconds, normal", seconds, 280
    yield "seconds, tuned", learned["seconds"]["total"], 1500
    yield "normal / fast", seconds / fast["seconds"]["total"], 1.5
    yield f"normal / two forwards and statistics ({unavoidable:.0f} s)", seconds / unavoidable, 2.0
    yield "peak memory in GB, normal", normal["peak_memory_bytes"] / 1e9, 1.2
    for bits, bar in ((4, 0.5), (3, 0.45), (2, 0.35)):
        yield f"KL, {bits} bit, normal / common", spread.kl(_NORMAL, bits) / spread.kl(_COMMON, bits), bar
    least = min(main.kl(name, 2) for name in (_COMMON, _FAST, _NORMAL, _BEST))
    yield "KL, 2 bit, tuned / the best GPTQ", tuned.kl(_TUNED, 2) / least, 0.6
    for setting in _OFF:
        yield f"KL of normal / of normal without one improvement: {setting}", 1 / parts.gain(_NORMAL, setting), 1.0
    for setting in _OPTIONS:
        yield f"KL of normal / of normal with an unused option: {setting}", 1 / parts.gain(_NORMAL, setting), 1.0
    yield "KL of normal with 2 passes, as best has / of normal", 1 / parts.gain(_TWICE, _NORMAL), 1.0
    for name in ("main", "documentation"):
        for better, worse in ((_FAST, _COMMON), (_NORMAL, _FAST), (_BEST, _NORMAL)):
            what = f"KL of {better.partition(':')[0]} / {worse.partition(':')[0]} in the table {name!r}"
            yield what, 1 / tables[name].gain(better, worse), 1.0


if __name__ == "__main__":
    run(CheckConfig, check)
