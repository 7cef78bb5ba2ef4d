"""What decides how much memory and time a block takes: the text, the method, and this process's share of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from llmq.algorithms.gptq import rows_per_solve
from llmq.calibration.input_statistics import target_moment_is_narrow
from llmq.calibration.work_split import portion_of
from llmq.checkpoint.output_dir import unfinished_work
from llmq.core.distributed import Ranks, processes_here
from llmq.core.memory import free_memory
from llmq.models.block_structure import Group
from llmq.plan.block_shapes import Layout
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

_MEMORY_SHARE = 0.25  # of what is free: hidden states that need more wait on disk


@dataclass(frozen=True)
class States:
    """Hidden states of this process while they wait."""

    nbytes: int
    directory: Path | None
    """None: in memory."""


@dataclass(frozen=True)
class Workload:
    """What of a run, and of this process in it, decides how much memory and time a block takes."""

    tokens: int
    held_out: int
    batch: int
    """Tokens that run through a block together."""
    sums: int
    """Of one kind that are there at once: of the calibration tokens, the held-out ones, and one that grows."""
    streams: int
    """1, or 2 with the original model's."""
    stored: int
    """Bytes of a number of a linear, in a block that is loaded; then of one as matmuls want it, and of any other."""
    factors: int
    others: int
    sequential: bool
    statistics: bool
    states: int
    """Bytes of hidden states in memory."""
    together: int
    """Rows solved at once."""
    ranks: Ranks

    def stages(self, layout: Layout) -> list[list[Group]]:
        """Groups that are solved between two runs of the block."""
        return [[group] for group in layout.groups] if self.sequential else [list(layout.groups)]

    def target_moment(self, layout: Layout, group: Group) -> tuple[int, bool]:
        """Numbers in the growing sum of a group's target moment, and whether it is still to be multiplied by W."""
        rows, columns = layout.shape(group)
        narrow = target_moment_is_narrow(group, rows, columns)
        return ((rows if narrow else columns) * columns if self.streams == 2 else 0), not narrow


def workload_of(request: Request, run: Run, states: States) -> Workload:
    """That of this process."""
    portion, compute, tokens = portion_of(request.tokens, request.ranks), request.compute, request.tokens
    counts = [sum(share.held_out == kind for share in portion.shares) for kind in (False, True)]
    sizes = [batch.numel() for batch in portion.batches]
    return Workload(
        tokens=sum(sizes[: portion.held_out_from]),
        held_out=sum(sizes[portion.held_out_from :]),
        batch=max(sizes, default=0),
        sums=max(min(2, counts[0]), 1 + min(2, counts[1])),
        streams=2 if run.matching and len(tokens.held_out) else 1,
        stored=run.linear_dtype(compute).itemsize,
        factors=compute.factors.itemsize,
        others=compute.dtype.itemsize,
        sequential=run.sequential,
        statistics=run.algorithm.needs_statistics(run.config),
        states=0 if states.directory is not None else states.nbytes,
        together=rows_per_solve(compute.device),
        ranks=request.ranks,
    )


def states_of(request: Request, run: Run) -> States:
    """How large the hidden states of this process are, and where they wait."""
    config, ranks = request.config, request.ranks
    tokens = request.tokens.train.numel() + request.tokens.held_out.numel()
    size = tokens * request.source.config.get_text_config().hidden_size * request.compute.dtype.itemsize
    size = size * (2 if run.matching else 1) // ranks.size
    free = free_memory(torch.device("cpu"))
    if config.offload_dir is None and (free is None or size * processes_here(ranks) <= _MEMORY_SHARE * free):
        return States(size, None)
    which = hashlib.sha256(str(config.output.resolve()).encode()).hexdigest()[:12]
    parent = config.offload_dir or unfinished_work(config.output)
    return States(size, parent / f"llmq-{which}-{ranks.rank}.partial")
