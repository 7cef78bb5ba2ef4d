"""Finds the fastest kernel tiles for the layers of a model on this GPU."""

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from llmq_kernels.choose import Problem, user_table
from llmq_kernels.tune import merged, tune, write_table

from llmq.checkpoint.module_matching import packed_target
from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Grid
from llmq.models.locate import locate
from llmq.models.model_source import ModelSource, build_skeleton
from llmq.models.packable import can_pack, fit_group_size
from llmq.runtime.model_config import model_config

# One number of tokens for each bucket of a table up to 256. The bucket up to 8 is tuned at 1: it is mostly decoding.
_TOKENS = (1, 16, 32, 64, 128, 256)


def check_gpu() -> None:
    """Raise WorkError if there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise WorkError("there is no CUDA GPU here, so there is nothing to tune: matmuls on a CPU have no tiles")


def problems_of(model: str, grid: Grid, trust_remote_code: bool = False) -> list[Problem]:
    """Return the matmuls to tune for a packed checkpoint, or for an original model that will be packed on `grid`.

    Raises RequestError if the kernels can run none of them.
    """
    path = locate(model, trust_remote_code)
    if is_packed(path):
        return at_all_sizes(packed_problems(Checkpoint(path), trust_remote_code))
    return at_all_sizes(original_problems(ModelSource(model, trust_remote_code), grid))


def packed_problems(checkpoint: Checkpoint, trust_remote_code: bool = False) -> list[Problem]:
    """Return the one-token problems of a packed checkpoint's layers, each once. Reads no weights."""
    model = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
    checkpoint = checkpoint.for_model(model)
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    problems = set()
    for name in checkpoint.linears:
        linear, scheme = packed_target(model, checkpoint, name), checkpoint.schemes[name]
        N, K = linear.out_features, linear.in_features
        problems.add(Problem(scheme.bits, K // scheme.groups(K), scheme.symmetric, dtype, 1, N, K))
    return sorted(problems, key=lambda problem: (problem.N * problem.K, problem.N))


def original_problems(source: ModelSource, grid: Grid) -> list[Problem]:
    """Return the one-token problems that an original model will have once it is packed, each once."""
    linears = [m for block in source.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    shapes = {(m.out_features, m.in_features) for m in linears if can_pack(m, grid.bits)}
    size = fit_group_size(grid.group_size, {columns for _, columns in shapes})
    dtype = str(source.dtype).removeprefix("torch.")
    problems = [Problem(grid.bits, K if size == -1 else size, grid.symmetric, dtype, 1, N, K) for N, K in shapes]
    return sorted(problems, key=lambda problem: (problem.N * problem.K, problem.N))


def at_all_sizes(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that have kernels, once for each of _TOKENS; few tokens come first.

    Raises RequestError if no problem has a kernel.
    """
    problems = list(problems)
    kept = [problem for problem in problems if problem.has_kernel]
    if not kept:
        kinds = ", ".join(sorted({f"groups of {p.group_size} in {p.dtype}" for p in problems})) or "no packed layer"
        raise RequestError(
            "the kernels need float16 or bfloat16, and groups whose size is a power of two from 16 on; "
            f"this model has {kinds}.\nIt runs with torch's own matmul, which has nothing to tune."
        )
    return [Problem(p.bits, p.group_size, p.symmetric, p.dtype, M, p.N, p.K) for M, p in product(_TOKENS, kept)]


def tune_here(problems: list[Problem], seconds: float) -> tuple[Path, list[dict[str, Any]]]:
    """Measure on this GPU, write the table, and return its path and its new rows."""
    from llmq_kernels.op import describe
    from llmq_kernels.trial import Trial, time_graph  # Triton is imported where there is a GPU for it

    where = torch.device("cuda", torch.cuda.current_device())
    device, end = describe(where), time.perf_counter() + seconds
    try:
        rows = tune(device, _shown(problems), Trial(where, time_graph), lambda: time.perf_counter() > end)
    except RuntimeError as error:
        raise WorkError(str(error)) from None
    if not rows:
        raise WorkError(f"no problem was started within {seconds:g} seconds; allow more with --seconds")
    path = user_table(device.name)
    write_table(path, device, merged(path, rows))
    return path, rows


def _shown(problems: list[Problem]) -> Iterator[Problem]:
    for i, problem in enumerate(problems, 1):
        print(f"{i}/{len(problems)}: {problem.M} tokens, {problem.N} x {problem.K}", file=sys.stderr, flush=True)
        yield problem
