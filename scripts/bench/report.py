"""Print all that was measured of the kernels, compared with the peers and with the bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from bench import bars
from bench.plan import Plan, Shape
from bench.results import Results

Row = dict[str, Any]
_COLUMNS = {"cublas_bf16": "x bf16", "cublas_fp16": "x fp16", "tinygemm": "x tiny", "humming": "x humm"}
_COLUMNS |= {"gemlite": "x geml", "dequantize": "x deq", "rule": "x rule"}
_SPEEDS = {"decode": ("packed", "dense"), "generate": ("packed", "merged", "dense")}


class Times:
    """The rows of timings, by path, number of tokens, shape, bits and dtype."""

    def __init__(self, results: Results, plan: Plan) -> None:
        self.results, self.plan = results, plan
        read = results.get("ceiling", "read")
        self.read_rate: float | None = read["rate"] if read else None
        self._rows = {tuple(row["key"]): row for row in results.of("time")}

    def get(self, path: str, M: int, shape: Shape, bits: int = 4, dtype: str | None = None) -> Row | None:
        if path == "gemlite":  # with its table or with its own tuning; the faster one counts
            both = [self._rows.get((p, bits, dtype or self.plan.dtype, M, *shape)) for p in ("gemlite", "gemlite_h100")]
            return min((row for row in both if row), key=lambda row: row["us"], default=None)
        key = (bits, dtype or self.plan.dtype, M, *shape)
        if path == "llmq":  # with the rule's tile until it is tuned
            return self._rows.get((path, *key)) or self._rows.get(("rule", *key))
        return self._rows.get((path, *key))

    def speedup(self, over: str, M: int, shape: Shape, bits: int = 4, dtype: str | None = None) -> float | None:
        """Return the speed-up of our kernel over a path. The path runs at 4 bit, or on dense weights."""
        ours, theirs = self.get("llmq", M, shape, bits, dtype), self.get(over, M, shape)
        return theirs["us"] / ours["us"] if ours and theirs else None

    def fraction(self, M: int, shape: Shape) -> float | None:
        """Return the time for reading the bytes at the measured bandwidth, divided by our time."""
        ours = self.get("llmq", M, shape)
        return ours["bytes"] / self.read_rate / (1e-6 * ours["us"]) if ours and self.read_rate else None

    def mean(self, values: Iterable[float | None]) -> float | None:
        """Return the geometric mean of the values that are not None, or None if there are none."""
        logs = [math.log(value) for value in values if value]
        return math.exp(sum(logs) / len(logs)) if logs else None


def lines(results: Results, plan: Plan) -> Iterator[str]:
    """Yield the lines of the report."""
    times = Times(results, plan)
    yield from _ceilings(results)
    yield f"4 bit, group {plan.group}, {plan.dtype}; x: speed-up over a peer; twice: spread of two timings"
    for shape in plan.shapes:
        yield from _shape(times, shape)
    yield from _means(times)
    yield from _widths(times)
    yield from _tuned(results.of("tune"))
    yield from _steps_of_models(times)
    correct = results.of("correct")
    if correct:
        equal, twins = sum(row["twin_equal"] for row in correct), sum(row["twins"] for row in correct)
        worst = max(row["error"] for row in correct)
        yield f"correctness: {sum(row['cases'] for row in correct)} cases, largest error {worst:.1e}"
        yield f"PTX and its twin in plain Triton: the same bits in {equal} of {twins} comparisons"


def _ceilings(results: Results) -> Iterator[str]:
    rows = {row["key"][0]: row for row in results.of("ceiling")}
    texts = [f"{name} {rows[name]['rate'] / 1e12:.2f} TB/s" for name in ("read", "copy") if name in rows]
    if "matmul" in rows:
        texts.append(f"bf16 matmul {rows['matmul']['rate'] / 1e12:.0f} TFLOP/s")
    if "interval" in rows:
        texts.append(f"a launch every {rows['interval']['us']:.2f} us")
    if "interval_pdl" in rows:
        texts.append(f"{rows['interval_pdl']['us']:.2f} us with dependent launch")
    yield "; ".join(texts)
    compiled = results.get("compile", "rule")
    if compiled:
        yield (
            f"compile: {compiled['binaries']} binaries in {compiled['cold_wall']:.1f} s by {compiled['workers']} "
            f"processes ({compiled['cold_in_all']:.1f} s one by one, slowest {compiled['cold_slowest']:.1f}), "
            f"from the cache {compiled['warm_in_all']:.2f} s"
        )


def _shape(times: Times, shape: Shape) -> Iterator[str]:
    yield ""
    names = " ".join(f"{name:>6}" for name in ("of R", *_COLUMNS.values()))
    yield f"{'M':>5} {'us':>8} {'twice':>6} {names}  tile, bars: N x K = {shape[0]} x {shape[1]}"
    for M in sorted({*times.plan.first, *times.plan.later}):
        row = times.get("llmq", M, shape)
        if row is None:
            continue
        peers = [times.speedup(path, M, shape) for path in _COLUMNS]
        numbers = " ".join(f"{_times(value):>6}" for value in (times.fraction(M, shape), *peers))
        spread = abs(row["twice"][0] / row["twice"][1] - 1)
        verdicts = _verdict("", peers[0], bars.SPEEDUP.get(M, {}).get(shape))
        if M == 1:
            verdicts += _verdict("of R ", times.fraction(M, shape), bars.FRACTION.get(shape))
        yield f"{M:>5} {row['us']:>8.2f} {spread:>6.1%} {numbers}  {tile_name(row['tile'])}{verdicts}"


def tile_name(tile: Row | None) -> str:
    """Return a short name such as 64x8w4s3c64p/8.

    It means BN x BM, w warps, s stages, c columns per turn of the loop over K, f if scales are folded into the weights,
    p if launched dependently, / splits.
    """
    if tile is None:
        return "dequantize"
    flags = ("f" if tile["fold"] else "") + ("p" if tile["pdl"] else "")
    return f"{tile['BN']}x{tile['BM']}w{tile['warps']}s{tile['stages']}c{tile['chunk']}{flags}/{tile['splits']}"


def _verdict(name: str, value: float | None, bar: bars.Bar | None) -> str:
    """Compare a value with its bar. Returns an empty text if one of them is missing."""
    if value is None or bar is None:
        return ""
    word = "stretch" if value >= bar[1] else "must" if value >= bar[0] else "BELOW"
    return f"  {name}{word} ({bar[0]:g}/{bar[1]:g})"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _means(times: Times) -> Iterator[str]:
    yield ""
    yield "speed-up of our kernels over each path, geometric means over the shapes"
    for M in sorted({*times.plan.first, *times.plan.later}):
        texts = []
        for path in _COLUMNS:
            values = [times.speedup(path, M, shape) for shape in times.plan.shapes]
            mean, count = times.mean(values), sum(value is not None for value in values)
            if mean is not None:
                some = "" if count == len(values) else f" ({count} shapes)"
                texts.append(f"{path} {mean:.2f}{some}{_verdict('', mean, bars.PEERS.get(path, {}).get(M))}")
        if texts:
            yield f"{M:>5}  " + ", ".join(texts)


def _widths(times: Times) -> Iterator[str]:
    for bits in times.plan.widths:
        for shape in times.plan.shapes:
            speedup = times.speedup("cublas_bf16", 1, shape, bits)
            if speedup is not None:
                verdict = _verdict("", speedup, bars.WIDTHS.get(bits))
                yield f"{bits} bit, M=1, {shape[0]} x {shape[1]}: {speedup:.2f} x bf16{verdict}"
    for M in times.plan.first:
        values = [times.speedup("cublas_fp16", M, shape, dtype="float16") for shape in times.plan.shapes]
        mean = times.mean(values)
        if mean is not None:
            yield f"float16, M={M}: {mean:.2f} x cublas_fp16 (geometric mean)"


def _tuned(rows: list[Row]) -> Iterator[str]:
    gains = [row["rule_us"] / row["us"] for row in rows if row["rule_us"]]
    skipped = [skip for row in rows for skip in row["skipped"]]
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        yield f"tuning: {len(rows)} problems, {mean:.2f} x the rule on average, at most {max(gains):.2f}"
    for why in list(dict.fromkeys(skip["why"] for skip in skipped))[:4]:
        tiles = [skip["tile"] for skip in skipped if skip["why"] == why]
        yield f"tuning: {len(tiles)} tiles skipped, for example {tile_name(tiles[0])}: {why}"


def _steps_of_models(times: Times) -> Iterator[str]:
    bar = bars.tokens_per_second(times.read_rate) if times.read_rate else None
    for kind, names in _SPEEDS.items():
        rows = [row for row in times.results.of(kind) if row["key"][0] in names]
        for row in rows:
            what, how = row["key"][:2]
            speed = row["tokens_per_second"]
            verdict = _verdict("", speed, bar) if (kind, what, how) == ("decode", "packed", "eager") else ""
            yield f"{kind}, {how}, {what}: {speed:.1f} tokens/s{verdict}"
