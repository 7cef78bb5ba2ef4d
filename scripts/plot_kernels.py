"""Draw the kernels' measurements of scripts/gpu_round.py: the speed-up over cuBLAS against tokens, and a roofline.

    python scripts/plot_kernels.py --results gpu-round/round.jsonl --output plots

The script needs matplotlib (the extra `plots`). It writes speedup.png and roofline.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import INTERPRETER
from bench.results import Row, is_good, latest, rows_in

Line = list[tuple[float, float]]

# Name, colour and line width. Ours is wider, to stand out.
PATHS = {
    "llmq": ("llmq", "#b3541e", 2.2),
    "tinygemm": ("tinygemm (torch)", "#4a6a8a", 1.3),
    "gemlite": ("gemlite", "#5d8a66", 1.3),
    "humming": ("humming", "#8a5a83", 1.3),
    "dequantize": ("dequantize + cuBLAS", "#9a9a9a", 1.3),
}
_INK, _FAINT = "#333333", "#bbbbbb"


def load(path: Path, toy: bool) -> list[Row]:
    """Return the rows in the file that have the latest device, versions and kernels; for each key the last one.

    Raises ValueError if there are none, or if they come from a toy run and `toy` is false.
    """
    rows = rows_in(path.read_text(encoding="utf-8"))
    ours = [row for row in rows if row["kind"] == "time" and row.get("kernels") and is_good(row)]
    if not ours:
        raise ValueError(f"{path} contains no timings of llmq's kernels; run gpu_round.py, and give its round.jsonl")
    if ours[-1]["device"] == INTERPRETER and not toy:
        raise ValueError(
            f"{path} is a toy run in Triton's interpreter: nothing in it is a measurement; --toy draws it anyway"
        )
    good = [row for row in latest(rows, ours[-1]).values() if is_good(row)]
    tuned = {tuple(row["key"][1:]) for row in good if row["kind"] == "time" and row["key"][0] == "llmq"}
    for row in good:  # what is not tuned has the rule's tile
        if row["kind"] == "time" and row["key"][0] == "rule" and tuple(row["key"][1:]) not in tuned:
            row["path"] = "llmq"
    return good


def series(rows: Sequence[Row], path: str, shape: tuple[int, int]) -> dict[int, Row]:
    """Return the 4-bit row of a path for each number of tokens. Of gemlite's two tunings, the faster one counts."""
    names = ("gemlite", "gemlite_h100") if path == "gemlite" else (path,)
    fastest: dict[int, Row] = {}
    for row in rows:
        is_it = row["kind"] == "time" and row["path"] in names and row["bits"] == 4 and (row["N"], row["K"]) == shape
        if not is_it or row["key"][2] != main_dtype(rows):
            continue
        if row["us"] < fastest.get(row["M"], {"us": float("inf")})["us"]:
            fastest[row["M"]] = row
    return dict(sorted(fastest.items()))


def main_dtype(rows: Sequence[Row]) -> str:
    """Return the dtype that most rows have. A few rows have another one."""
    dtypes = [row["key"][2] for row in rows if row["kind"] == "time"]
    return max(dtypes, key=dtypes.count)


def shapes_of(rows: Sequence[Row]) -> list[tuple[int, int]]:
    shapes = {(row["N"], row["K"]) for row in rows if row["kind"] == "time"}
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def speedups(rows: Sequence[Row], shape: tuple[int, int]) -> dict[str, Line]:
    """Return a line for each path: points (tokens, speed-up over cuBLAS with bf16 weights)."""
    base = series(rows, "cublas_bf16", shape)
    lines = {}
    for path in PATHS:
        line = [(M, base[M]["us"] / row["us"]) for M, row in series(rows, path, shape).items() if M in base]
        if line:
            lines[path] = line
    return lines


def plot_speedups(rows: Sequence[Row], output: Path) -> None:
    """Draw the speed-ups, one panel for each shape."""
    import matplotlib.pyplot as plt

    shapes = shapes_of(rows)
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns + 1.0, 2.9 * lines + 0.5), sharex=True, sharey=True, squeeze=False
    )
    for i, (axis, shape) in enumerate(zip(axes.flat, shapes, strict=False)):
        axis.axhline(1, color=_FAINT, linewidth=0.8)
        for path, line in speedups(rows, shape).items():
            _, colour, width = PATHS[path]
            order = 3 if path == "llmq" else 2
            axis.plot(*zip(*line, strict=True), color=colour, linewidth=width, marker="o", ms=width + 1, zorder=order)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{shape[0]} × {shape[1]}", loc="left", fontsize=9, color=_INK)
        if i == 0:
            axis.text(axis.get_xlim()[1], 1.03, "cuBLAS bf16", fontsize=7, color="#888888", ha="right", va="bottom")
    for axis in axes.flat[len(shapes) :]:
        axis.set_axis_off()
    axes[0, 0].set_ylim(bottom=0)  # sets it for all panels, because they share their axes
    most = max(row["M"] for row in rows if row["kind"] == "time")
    ticks = [4**i for i in range(8) if 4**i <= most]
    axes[0, 0].set_xticks(ticks, map(str, ticks))
    axes[0, 0].minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("× cuBLAS bf16")
    _label_lines(axes[0, -1], speedups(rows, shapes[columns - 1]))
    _finish(figure, axes.flat, rows, "4-bit weights, groups of 128: speed-up over bf16", output / "speedup.png")


def _label_lines(axis: Any, lines: dict[str, Line]) -> None:
    """Write the names of the lines to the right of their last points, moved up where they would overlap."""
    left, right = axis.get_xlim()
    apart = 0.075 * axis.get_ylim()[1]
    at = -apart
    for path, line in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        at = max(line[-1][1], at + apart)
        axis.text(right * (right / left) ** 0.03, at, PATHS[path][0], fontsize=7, color=PATHS[path][1], va="center")


def plot_roofline(rows: Sequence[Row], output: Path) -> None:
    """Draw operations per second against operations per byte, with the measured ceilings."""
    import matplotlib.pyplot as plt

    ceilings = {row["key"][0]: row for row in rows if row["kind"] == "ceiling"}
    if not {"read", "matmul"} <= ceilings.keys():
        raise ValueError("the results lack the ceilings read and matmul; run gpu_round.py --only speed first")
    bandwidth, peak = ceilings["read"]["rate"], ceilings["matmul"]["rate"]
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    low, high = peak / bandwidth / 300, peak / bandwidth * 30
    for path in ("dequantize", "llmq", "cublas_bf16"):
        name, colour = ("cuBLAS bf16", "#444444") if path == "cublas_bf16" else PATHS[path][:2]
        points = [
            (row["operations"] / row["bytes"], row["operations"] / row["us"] * 1e6)
            for shape in shapes_of(rows)
            for row in series(rows, path, shape).values()
        ]
        if points:
            low, high = min(low, min(x for x, _ in points) / 2), max(high, max(x for x, _ in points) * 2)
            axis.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.8, linewidths=0, label=name)
    ridge = peak / bandwidth
    axis.plot([low, ridge, high], [low * bandwidth, peak, peak], color=_INK, linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.text(high, peak * 1.12, f"{peak / 1e12:.0f} TFLOP/s (cuBLAS, bf16)", fontsize=7, color=_INK, ha="right")
    axis.annotate(
        f"{bandwidth / 1e12:.2f} TB/s read", (low * 6, low * 6 * bandwidth), (-6, 2), textcoords="offset points",
        fontsize=7, color=_INK, ha="right",
    )  # fmt: skip
    axis.set_xlabel("operations per byte of weights, tokens and results")
    axis.set_ylabel("operations per second")
    axis.legend(frameon=False, fontsize=7, loc="lower right", handletextpad=0.2)
    _finish(figure, [axis], rows, "How close to what the machine can do", output / "roofline.png")


def _finish(figure: Any, axes: Any, rows: Sequence[Row], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
        axis.tick_params(colors="#666666", labelsize=7, which="both", width=0.6)
        axis.xaxis.label.set(fontsize=8, color=_INK)
        axis.yaxis.label.set(fontsize=8, color=_INK)
    ours = next(row for row in rows if row["kernels"])
    versions = f"{ours['device']}, torch {ours['torch']}, triton {ours['triton']}, {ours['time'][:10]}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_INK)
    figure.text(0.01, 0.005, versions, fontsize=6, color="#888888")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="round.jsonl of gpu_round.py")
    parser.add_argument("--output", type=Path, default=Path("plots"), help="folder for the PNG files (default plots)")
    parser.add_argument("--toy", action="store_true", help="also draw a toy run; its numbers mean nothing")
    options = parser.parse_args()
    try:
        import matplotlib as mpl
    except ImportError:
        print("error: matplotlib is not installed; run pip install matplotlib, or install llmq[plots]", file=sys.stderr)
        return 2
    mpl.use("Agg")
    try:
        rows = load(options.results, options.toy)
        options.output.mkdir(parents=True, exist_ok=True)
        plot_speedups(rows, options.output)
        plot_roofline(rows, options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output / 'speedup.png'} and {options.output / 'roofline.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
