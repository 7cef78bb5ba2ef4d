"""Draws llmq_report.png, a picture of a run, from its report alone. So it can be drawn again later.

error per layer against rounding to nearest    |    seconds per phase    |    peak memory over time
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.output_dir import PICTURE, REPORT
from llmq.core.errors import RequestError, WorkError
from llmq.models.untrusted_files import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BELOW: dict[str, Any] = {"frameon": False, "fontsize": "small", "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}


def check_plot() -> None:
    """Raise RequestError if matplotlib is missing. Called before hours of work, not after them."""
    if find_spec("matplotlib") is None:
        raise RequestError("plot draws with matplotlib, which is not installed: pip install 'llmq[plots]'")


def draw(output: Path) -> None:
    """Draw the report of a finished run beside it. Raises WorkError if that fails; the checkpoint is not harmed."""
    try:
        plot(read_json(output, REPORT), output / PICTURE)
    except OSError as error:
        raise WorkError(f"{output} is whole, but {PICTURE} cannot be written: {error}") from None


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report into an image file."""
    figure_of(report).savefig(path, dpi=160)


def figure_of(report: dict[str, Any]) -> Figure:
    """Return a figure with the three panels. It is made without pyplot, which would look for a screen."""
    from matplotlib.figure import Figure

    budgets: list[dict[str, Any]] = [report["budget"]] if report.get("budget") else []
    figure = Figure((13 + 3.5 * len(budgets), 4.4), layout="constrained")
    widths = [1.5, 0.8, 1.2, *[1.2] * len(budgets)]
    errors, phases, memory, *more = figure.subplots(1, len(widths), width_ratios=widths)
    _errors(errors, report)
    _phases(phases, report["seconds"])
    _memory(memory, report)
    for axes, budget in zip(more, budgets, strict=True):
        _budget(axes, budget)
    for axes in (errors, phases, memory, *more):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _errors(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the error over the blocks: a line for each kind of group, and a faint one for rounding to nearest."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for entry in report["groups"]:
        kind = "+".join(name.rpartition(".")[2].removesuffix("_proj") for name in entry["linears"])
        lines.setdefault(kind, []).append((_number(entry["block"]), entry["error"], entry["rtn_error"]))
    for kind, points in lines.items():
        blocks, ours, nearest = zip(*points, strict=True)
        (line,) = axes.plot(blocks, ours, marker="o", markersize=3, linewidth=1.5, label=kind)
        axes.plot(blocks, nearest, color=line.get_color(), linewidth=1, alpha=0.35)
    if any(error > 0 for points in lines.values() for _, *two in points for error in two):
        axes.set_yscale("log")
    axes.plot([], [], color="grey", linewidth=1, alpha=0.5, label="rounded to nearest")
    axes.locator_params(axis="x", integer=True)
    what = "held-out output error" if report["groups"] and report["groups"][0].get("tokens") else "weight error"
    axes.set(title=f"error per layer, {report['config']['method']}", xlabel="block", ylabel=f"relative {what}")
    axes.grid(alpha=0.3, which="major")
    axes.legend(ncols=5, columnspacing=1.2, **_BELOW)


def _phases(axes: Axes, seconds: dict[str, float]) -> None:
    """Draw a bar for each phase, the longest on top."""
    phases = {name: length for name, length in seconds.items() if name != "total"}
    phases["other"] = max(seconds["total"] - sum(phases.values()), 0.0)
    longest = sorted(phases, key=lambda name: phases[name])
    bars = axes.barh(longest, [phases[name] for name in longest], height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    axes.margins(x=0.15)
    axes.set(title=f"time, {seconds['total']:.0f} s in all", xlabel="seconds")
    axes.tick_params(axis="y", length=0)


def _memory(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the peak memory between two groups, and a mark at each interruption."""
    groups = report["groups"]
    times = [0.0, *(entry["at"] for entry in groups)]
    peaks = [entry["peak_memory_bytes"] / 1e9 for entry in groups] or [0.0]
    most = max([*peaks, report["peak_memory_bytes"] / 1e9])
    axes.step(times, (peaks[:1] + peaks)[: len(times)], where="pre", linewidth=1.5)
    for i, block in enumerate(report["resumed"]):
        at = max((entry["at"] for entry in groups if _number(entry["block"]) <= _number(block)), default=0.0)
        label = None if i else "interrupted and resumed"
        axes.axvline(at, color="tab:red", linewidth=1, linestyle="--", label=label)
    if report["resumed"]:
        axes.legend(**_BELOW)
    axes.set_ylim(0, 1.1 * most)
    axes.set(title=f"memory, {most:.2f} GB at most", xlabel="seconds", ylabel="peak between two groups, GB")
    axes.grid(alpha=0.3)


def _budget(axes: Axes, budget: dict[str, Any]) -> None:
    """Draw the KL over the stored bits: what uniform bits would give, and what the budget chose."""
    uniform = sorted((each["stored_bits"], each["kl"]) for each in budget["uniform"].values() if each["kl"] > 0)
    if uniform:
        axes.plot(*zip(*uniform, strict=True), marker="o", color="grey", linewidth=1, label="all alike, predicted")
    axes.plot(budget["stored_bits"], budget["predicted_kl"], "s", color="tab:blue", label="chosen, predicted")
    if budget.get("measured_kl") is not None:
        axes.plot(budget["stored_bits"], budget["measured_kl"], "*", color="tab:red", markersize=11, label="measured")
    if uniform:
        axes.set_yscale("log")
    axes.set(title="the budget", xlabel="stored bits per weight", ylabel="KL to the original, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, **_BELOW)


def _number(step: str) -> float:
    """Return the index of a block; other steps come before the blocks, but training comes after them."""
    last = step.rpartition(".")[2]
    return float(last) if last.isdigit() else math.inf if step == "training" else -1.0
