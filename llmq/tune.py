"""python -m llmq.tune: find the fastest tiles for a model's layers on this GPU, once; later runs use them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from llmq_kernels.choose import Problem, user_table
from llmq_kernels.tune import merged, tune, write_table

from llmq.arch import fit_group_size, packable_widths
from llmq.checkpoint import Checkpoint, is_packed
from llmq.cli import run
from llmq.errors import RequestError, WorkError
from llmq.hub import locate
from llmq.load import model_config
from llmq.place import packed_target
from llmq.settings import Grid
from llmq.source import ModelSource, build_skeleton

# One for each bucket of a table up to 256. Decoding is what up to 8 tokens mostly are, so that bucket is tuned at 1.
_TOKENS = (1, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class TuneConfig:
    """Time the kernels on the shapes of a model's layers and keep the fastest tiles in ~/.cache/llmq/tuned."""

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`) that is going to be one."""
    bits: int = 4
    """Bits per weight an original model is going to have; a packed checkpoint says so itself."""
    group_size: int = 128
    """Its group size, likewise; -1 for a whole row."""
    seconds: float = 60.0
    """Begin nothing after this; few tokens come first."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size)


def packed_problems(checkpoint: Checkpoint, trust_remote_code: bool = False) -> list[Problem]:
    """One-token problems of a packed checkpoint's layers, each once, known without reading its weights."""
    model = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    problems = set()
    for name in checkpoint.linears:
        linear, scheme = packed_target(model, checkpoint, name), checkpoint.schemes[name]
        N, K = linear.out_features, linear.in_features
        problems.add(Problem(scheme.bits, K // scheme.groups(K), scheme.symmetric, dtype, 1, N, K))
    return sorted(problems, key=lambda problem: (problem.N * problem.K, problem.N))


def original_problems(source: ModelSource, grid: Grid) -> list[Problem]:
    """One-token problems of the layers that an original model will have, each once."""
    widths = packable_widths(source.blocks)
    size = fit_group_size(grid.group_size, widths)
    dtype = str(source.dtype).removeprefix("torch.")
    linears = [m for block in source.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    shapes = {(linear.out_features, linear.in_features) for linear in linears if linear.in_features in widths}
    problems = [Problem(grid.bits, K if size == -1 else size, grid.symmetric, dtype, 1, N, K) for N, K in shapes]
    return sorted(problems, key=lambda problem: (problem.N * problem.K, problem.N))


def at_all_sizes(problems: Iterable[Problem]) -> list[Problem]:
    """The problems that have kernels, for each of some numbers of tokens, few tokens first.

    Raises RequestError if there are none.
    """
    problems = list(problems)
    kept = [problem for problem in problems if problem.has_kernel]
    if not kept:
        kinds = ", ".join(sorted({f"groups of {p.group_size} in {p.dtype}" for p in problems})) or "no packed layer"
        raise RequestError(
            f"the kernels take float16 or bfloat16 and groups of a power of two from 16 on; here: {kinds}.\n"
            "Such a model runs, on torch's own matmul; there is nothing to tune"
        )
    return [Problem(p.bits, p.group_size, p.symmetric, p.dtype, M, p.N, p.K) for M, p in product(_TOKENS, kept)]


def tune_here(problems: list[Problem], seconds: float) -> tuple[Path, list[dict[str, Any]]]:
    """Measure on the present GPU; returns where the table is, and its new rows."""
    from llmq_kernels.op import describe
    from llmq_kernels.trial import Trial, time_graph  # Triton is imported where there is a GPU for it

    where = torch.device("cuda", torch.cuda.current_device())
    device, end = describe(where), time.perf_counter() + seconds
    try:
        rows = tune(device, _shown(problems), Trial(where, time_graph), lambda: time.perf_counter() > end)
    except RuntimeError as error:
        raise WorkError(str(error)) from None
    if not rows:
        raise WorkError(f"no problem was begun within {seconds:g} seconds; allow more with --seconds")
    path = user_table(device.name)
    write_table(path, device, merged(path, rows))
    return path, rows


def _shown(problems: list[Problem]) -> Iterator[Problem]:
    for i, problem in enumerate(problems, 1):
        print(f"{i}/{len(problems)}: {problem.M} tokens, {problem.N} x {problem.K}", file=sys.stderr, flush=True)
        yield problem


def tune_command(config: TuneConfig) -> None:
    """Tune, write the table, and say what it brought."""
    if not torch.cuda.is_available():
        raise WorkError("there is no CUDA GPU here: nothing to tune on a CPU, whose matmuls have no tiles to choose")
    path = locate(config.model, config.trust_remote_code)
    if is_packed(path):
        problems = packed_problems(Checkpoint(path), config.trust_remote_code)
    else:
        problems = original_problems(ModelSource(config.model, config.trust_remote_code), config.grid)
    problems = at_all_sizes(problems)
    table, rows = tune_here(problems, config.seconds)
    for row in rows:
        tile = row["tile"] or {}
        how = "BN={BN} BM={BM} warps={warps} stages={stages} splits={splits}".format_map(tile) if tile else "dequantize"
        gain = f", {row['rule_us'] / row['us']:.2f} times as fast as untuned" if row["rule_us"] else ""
        print(f"up to {row['M']:>3} tokens, {row['N']} x {row['K']}: {row['us']:.1f} us, {how}{gain}")
    left = len(problems) - len(rows)
    print(f"wrote {table}" + (f"; no time for {left} of {len(problems)} problems (--seconds)" if left else ""))


def main() -> None:
    """Entry point; the flags are the fields of TuneConfig."""
    run(TuneConfig, tune_command)


if __name__ == "__main__":
    main()
