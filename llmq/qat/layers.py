"""Which packed layers of a checkpoint are trained."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmq.checkpoint.output_dir import REPORT
from llmq.core.errors import RequestError
from llmq.core.train_config import WORST
from llmq.models.untrusted_files import read_json


def start_report(start: Path) -> dict[str, Any]:
    """Return the report of a packed checkpoint; empty if another tool wrote it."""
    return read_json(start, REPORT) if (start / REPORT).exists() else {}


def chosen_layers(wanted: str, sizes: dict[str, int], report: dict[str, Any]) -> set[str]:
    """Return the names of the packed linears that are trained.

    Args:
        wanted: names as for --train-layers, or worst:20%, or nothing for all.
        sizes: the weights in each packed linear, by its name in the model.
        report: of the packed checkpoint.

    Raises RequestError if a name fits no linear, or if the report has no errors.
    """
    if not wanted:
        return set(sizes)
    share = WORST.fullmatch(wanted)
    return _named(wanted, sizes) if share is None else _worst(float(share[1]) / 100, report, sizes)


def _named(wanted: str, sizes: dict[str, int]) -> set[str]:
    chosen = set[str]()
    for pattern in filter(None, map(str.strip, wanted.split(","))):
        fitting = {name for name in sizes if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not fitting:
            raise RequestError(f"train layers: no packed layer is called {pattern!r} (first: {min(sizes)})")
        chosen |= fitting
    if not chosen:
        raise RequestError(f"train layers: {wanted!r} names no layer")
    return chosen


def _worst(share: float, report: dict[str, Any], sizes: dict[str, int]) -> set[str]:
    """Return the layers with the largest errors: as many as have this share of all weights, at least one group."""
    groups = sorted(report.get("groups") or [], key=lambda group: -group["error"])
    if not groups:
        raise RequestError("train layers: the checkpoint has no llmq_report.json with errors; name the layers instead")
    chosen, left = set[str](), share * sum(sizes.values())
    for group in groups:
        names = {f"{group['block']}.{name}" for name in group["linears"]} & sizes.keys()
        left -= sum(sizes[name] for name in names)
        if left < 0 and chosen:
            break
        chosen |= names
    return chosen
