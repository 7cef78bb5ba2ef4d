"""List what llmq claims of a GPU: what, the bar, and what was measured. docs/gpu.md holds the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench import bars
from bench.plan import Plan
from bench.report import Times
from bench.results import Results

NOT_MEASURED = "not measured"


class Claim(NamedTuple):
    """A row of the table. The bar is the least value, or the text of what must be; None: it is only told."""

    what: str
    bar: str
    measured: str | None
    step: str
    """The step of the round that measures it."""
    kept: bool | None = None
    """Whether the bar is reached; None if there is none, or nothing was measured."""


def claims(results: Results, plan: Plan) -> Iterator[Claim]:
    """Yield all claims, in the order of the steps."""
    times = Times(results, plan)
    yield from _tests(results)
    yield from _correct(results, plan)
    yield from _kernels(times)
    yield from _experts(results, plan)
    yield from _models(times)
    yield from _quantization(results, plan)


def _tests(results: Results) -> Iterator[Claim]:
    steps = results.steps()
    texts = {
        "smoke": "the kernels give float64's results, also in a stream, a graph and torch.compile (short)",
        "pipeline": "a tiny model is quantized, trained, resumed, loaded and continued on CUDA as on a CPU",
        "tests": "all GPU tests of the kernels",
    }
    for step, what in texts.items():
        row = steps.get(step, {})
        measured, kept = None, None
        if "passed" in row:
            kept = False if "failed" in row else None if row["late"] else True
            measured = f"{row['passed']} passed" + ("" if kept else ", not all")
        yield Claim(what, "all pass", measured, step, kept)


def _correct(results: Results, plan: Plan) -> Iterator[Claim]:
    grid = plan.grid
    jobs = 2 * len(grid.bits) * len(grid.groups) * len(grid.dtypes)  # symmetric or not
    bad = sum(row["kind"] == "correct" for row in results.bad())
    rows = results.of("correct")
    measured = f"{len(rows)} of {jobs} kinds, {sum(row['cases'] for row in rows)} cases, {bad} kinds wrong"
    what = "every width, group and dtype against float64"
    yield Claim(what, "0 wrong", measured if rows or bad else None, "rest", bad == 0 if rows or bad else None)


def _kernels(times: Times) -> Iterator[Claim]:
    read, compiled = times.read_rate, times.results.get("compile", "rule")
    yield Claim("bandwidth of reading", "—", f"{read / 1e12:.2f} TB/s" if read else None, "speed")
    cold = f"{compiled['cold_wall']:.1f} s, {compiled['warm_in_all']:.2f} s from the cache" if compiled else None
    kept = compiled["cold_wall"] <= bars.COLD_START if compiled else None
    yield Claim(
        "first calls of a model's layers, compiled in parallel", f"≤ {bars.COLD_START:g} s", cold, "speed", kept
    )
    N, K = bars.GOAL_SHAPE
    for M, bar in bars.GOALS.items():
        what, step = (
            f"{M} token{'s'[: M > 1]}, {N}×{K}, 4 bit: × cuBLAS bf16",
            "tune" if M in times.plan.first else "rest",
        )
        yield _ratio(what, bar, times.speedup("cublas_bf16", M, bars.GOAL_SHAPE), step)
    fraction = times.fraction(1, bars.GOAL_SHAPE)
    yield _ratio(f"1 token, {N}×{K}, 4 bit: part of the bandwidth", bars.FRACTION[bars.GOAL_SHAPE][0], fraction, "tune")
    for path in ("tinygemm", "gemlite", "humming"):
        mean = times.mean(times.speedup(path, 1, shape) for shape in times.plan.shapes)
        bar = bars.PEERS[path][1][0] if path in bars.PEERS else None
        yield _ratio(f"1 token, 4 bit, mean of {len(times.plan.shapes)} shapes: × {path}", bar, mean, "tune")
    for bits, (bar, _) in bars.WIDTHS.items():
        values = times.mean(times.speedup("cublas_bf16", 1, s, bits) for s in times.plan.shapes)
        yield _ratio(f"1 token, {bits} bit, large shapes: × cuBLAS bf16", bar, values, "rest")


def _experts(results: Results, plan: Plan) -> Iterator[Claim]:
    sizes = plan.experts
    layer = f"top {sizes.top} of {sizes.experts} experts of {sizes.hidden}/{sizes.intermediate}, 4 bit"
    for tokens in sizes.tokens:
        packed, grouped = (results.get("experts", path, tokens) for path in ("packed", "grouped"))
        value = grouped["us"] / packed["us"] if packed and grouped else None
        what = f"{tokens} token{'s'[: tokens > 1]}, {layer}: × transformers' grouped_mm in bf16"
        yield _ratio(what, bars.EXPERTS.get(tokens), value, "experts")


def _models(times: Times) -> Iterator[Claim]:
    get, model = times.results.get, "LLaMA-7B's shape, batch 1"
    graph = [get("decode", kind, "eager", times.plan.dtype) for kind in ("packed", "dense")]
    speed, ratio = _speeds(graph)
    text = f"≥ {bars.tokens_per_second(bars.READ_RATE)[0]:.0f} tokens/s at {bars.READ_RATE / 1e12:g} TB/s"
    shown, kept = f"{speed:.0f} tokens/s" if speed else None, None
    if speed and times.read_rate:
        least = bars.tokens_per_second(times.read_rate)[0]
        shown, kept = f"{shown} (the bar here: {least:.0f})", speed >= least
    yield Claim(f"{model}: a decode step in one CUDA graph", text, shown, "decode", kept)
    yield _ratio(f"{model}: the same, × bf16", bars.TIMES_BF16[0], ratio, "decode")
    for loop, what, bar in (("fast", "fast_generate", bars.LOADED_TIMES_BF16), ("generate", "generate", None)):
        speed, ratio = _speeds([get("generate", kind, loop) for kind in ("merged", "dense")])
        name = f"{model}: llmq.load and {what}"
        yield Claim(name, "—", f"{speed:.1f} tokens/s" if speed else None, "decode")
        yield _ratio(f"{name}, × bf16 in the same loop", bar, ratio, "decode")
    loaded = get("generate", "packed", "generate")
    yield Claim(f"{model}: llmq.load", "—", f"{loaded['load_seconds']:.1f} s" if loaded else None, "decode")


def _quantization(results: Results, plan: Plan) -> Iterator[Claim]:
    q = plan.quantizing
    row = results.get("quantize", q.blocks, q.samples, q.length)
    what = f"GPTQ, effort normal, {q.samples}×{q.length} tokens, LLaMA-7B's shape"
    seconds = row["block_seconds"] if row else None
    took = f"{seconds:.1f} s ({_phases(row['phases'])})" if row else None
    kept = None if seconds is None else seconds <= bars.BLOCK_SECONDS
    yield Claim(f"{what}: a block", f"≤ {bars.BLOCK_SECONDS:g} s", took, "quantize", kept)
    minutes = f"{row['block_seconds'] * plan.decoder.layers / 60:.1f} min" if row else None
    yield Claim(f"{what}: {plan.decoder.layers} blocks, from that", "—", minutes, "quantize")
    peak = row.get("gpu_peak_bytes") if row else None
    shown, kept = (f"{peak / 1e9:.1f} GB", peak <= bars.BLOCK_BYTES) if peak else (None, None)
    yield Claim(f"{what}: peak memory of the GPU", f"≤ {bars.BLOCK_BYTES / 1e9:g} GB", shown, "quantize", kept)
    yield Claim("several processes on several GPUs (NCCL) write the bytes of one", "equal", None, "no step yet")


def _phases(seconds: dict[str, float]) -> str:
    """Return the share of each phase in the blocks of the run."""
    inside = {name: seconds[name] for name in ("read", "forward", "statistics", "solve", "write") if name in seconds}
    whole = sum(inside.values()) or 1.0  # in the toy round each rounds to 0
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in inside.items())


def _speeds(rows: list[dict[str, float] | None]) -> tuple[float | None, float | None]:
    """Return the tokens per second of the packed model, and their ratio to those of the dense one."""
    packed, dense = (row["tokens_per_second"] if row else None for row in rows)
    return packed, packed / dense if packed and dense else None


def _ratio(what: str, bar: float | None, value: float | None, step: str) -> Claim:
    kept = value >= bar if value is not None and bar is not None else None
    return Claim(what, "—" if bar is None else f"≥ {bar:g}", None if value is None else f"{value:.2f}", step, kept)


def markdown(results: Results, plan: Plan) -> Iterator[str]:
    """Yield the table for docs/gpu.md."""
    rows = results.steps().values()
    card, date = results.gpu if rows else "", max((row["time"][:10] for row in rows), default="")
    yield "| what | bar | measured | card | date | `gpu_round.py --only` |"
    yield "|---|---|---|---|---|---|"
    for claim in claims(results, plan):
        where = f"{card} | {date}" if claim.measured else " | "
        missed = " **(missed)**" if claim.kept is False else ""
        yield f"| {claim.what} | {claim.bar} | {claim.measured or NOT_MEASURED}{missed} | {where} | {claim.step} |"
