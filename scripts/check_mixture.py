"""Check what is said of mixtures of experts: quantize the upcycled demo model in four ways, and the dense one in one.

    python scripts/check_mixture.py --calibration valid.txt --text test.txt

Models that are missing are made (see upcycle.py and dither.py). Rows that are already in --results are not measured
again. Seconds are only meaningful if the machine does nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from compare_methods import CompareConfig, Row, rows_of, table
from dither import DitherConfig, write_dithered
from upcycle import UpcycleConfig, upcycle

from llmq.cli import run
from llmq.core.errors import WorkError

_ROUTED = "routed: --method gptq"
_LAYER, _ALL = (f"{name}: --method gptq --expert-statistics {name}" for name in ("layer", "all-tokens"))
_RTN = "rtn: --method rtn --grid mse"


@dataclass(frozen=True)
class MixtureConfig:
    """Compare ways to quantize a mixture of experts: 4 bit, group 64, 64 sequences of 512 tokens."""

    calibration: str = "pydoc"
    """Text to calibrate on."""
    text: str = "pytopics"
    """Text for the KL divergence; it should share nothing with the calibration text."""
    limit: int = 20
    """Chunks of 2048 tokens of this text."""
    mixture: Path = Path("demo-upcycled")
    """The upcycled demo model; made if it is missing."""
    dense: Path = Path("demo-dithered")
    """The dithered demo model; made if it is missing."""
    results: Path = Path("docs/benchmarks")
    """Directory of finished rows."""


def check(config: MixtureConfig) -> None:
    """Print tables and claims. Raises WorkError if a claim does not hold."""
    if not config.dense.exists():
        write_dithered(DitherConfig(config.dense))
    if not config.mixture.exists():
        upcycle(UpcycleConfig(config.mixture))
    rows: dict[str, list[Row]] = {}
    for name, comparison in _comparisons(config).items():
        rows[name] = rows_of(comparison)
        print(f"\n{name}\n", *table(comparison, rows[name]), sep="\n")
    print()
    failed = 0
    for what, measured, bar in _claims(rows["mixture"], rows["dense"][0]):
        holds = measured <= bar  # false for NaN
        failed += not holds
        print(f"{'holds' if holds else 'FAILS'}  {measured:8.3f} <= {bar:<8g} {what}")
    if failed:
        raise WorkError(f"{failed} claims do not hold")


def _comparisons(config: MixtureConfig) -> dict[str, CompareConfig]:
    dense = CompareConfig(str(config.dense), config.calibration, config.text, (_ROUTED,), bits=(4,), limit=config.limit)
    dense = replace(dense, results=config.results / "mixture-dense.jsonl")
    mixture = replace(dense, model=str(config.mixture), settings=(_RTN, _ROUTED, _LAYER, _ALL))
    return {"dense": dense, "mixture": replace(mixture, results=config.results / "mixture.jsonl")}


def _claims(mixture: list[Row], dense: Row) -> Iterator[tuple[str, float, float]]:
    """Yield (claim, measured value, largest allowed value)."""
    rtn, routed, layer, all_tokens = (row["kl"] for row in mixture)
    yield "KL of gptq / of rtn", routed / rtn, 0.4
    yield "KL with each expert's own tokens / with the layer's tokens for every expert", routed / layer, 1.0
    yield "KL with each expert's own tokens / with all tokens sent to all experts", routed / all_tokens, 1.0
    mine, its = (row["seconds"]["total"] / row["packed_weights"] * 1e6 for row in (mixture[1], dense))
    yield f"seconds per million weights: {mine:.3f} / {its:.3f} of the dense model", mine / its, 1.6


if __name__ == "__main__":
    run(MixtureConfig, check)
