"""Describes the work of one process: its share of the text, its dtypes and what the method needs."""

import hashlib
from dataclasses import dataclass

import torch

from llmq.algorithms.gptq import rows_per_solve
from llmq.calibration.hidden_states import States
from llmq.calibration.input_statistics import target_moment_is_narrow
from llmq.calibration.kept_inputs import most_kept
from llmq.calibration.work_split import portion_of
from llmq.checkpoint.output_dir import unfinished_work
from llmq.core.distributed import Ranks, processes_here
from llmq.core.memory import free_memory
from llmq.models.block_structure import Group
from llmq.plan.block_shapes import Layout, token_bytes
from llmq.run.block_quantizer import Run
from llmq.run.layer_problem import stages_of
from llmq.run.prepare import Request

_MEMORY_SHARE = 0.25  # hidden states that need more than this share of the free memory wait on disk
_DEVICE_SHARE = 1 / 3  # those that need no more than this share of a GPU's free memory stay there


@dataclass(frozen=True)
class Workload:
    """The work of this process in each block. Memory and time of a block follow from it and from the block's layout."""

    tokens: int  # calibration tokens; held-out ones are not among them
    held_out: int
    batch: int  # tokens that run through a block together
    sums: int  # sums of one shape in memory at once: of calibration tokens, held-out tokens and the current share
    streams: int  # 2 if the original model's hidden states run beside the quantized model's, else 1
    linear_bytes: int  # bytes of a linear's weight as it is loaded
    factor_bytes: int  # bytes of the same weight as matmuls want it
    other_bytes: int  # bytes of any other parameter
    sequential: bool
    statistics: bool
    states: int  # bytes in memory of what waits for the next block, mostly hidden states
    rows_per_solve: int
    ranks: Ranks
    arguments: int = 0  # bytes of `states` that are no hidden states: arguments of blocks that depend on the tokens
    experts: int = 0  # bytes in memory of what enters the experts of a block
    resident: int = 0  # bytes of hidden states that wait on the GPU
    resident_experts: int = 0  # the same for what enters the experts
    on_gpu: bool = False
    most_kept: int = 0  # largest number of bytes that a block keeps for its next run, where it computes

    def stages(self, layout: Layout) -> list[list[Group]]:
        """Return the groups in the order they are solved; a stage is solved between two runs of the block."""
        return stages_of(layout.groups, self.sequential)

    def target_moment(self, layout: Layout, group: Group) -> tuple[int, bool]:
        """Return the size of the sum for a group's target moment, and whether W must still be multiplied to it."""
        rows, columns = layout.shape(group)
        narrow = target_moment_is_narrow(group, rows, columns)
        return ((rows if narrow else columns) * columns if self.streams == 2 else 0), not narrow


def workload_of(request: Request, run: Run, states: States) -> Workload:
    """Return the work of this process."""
    portion, compute, tokens = portion_of(request.tokens, request.ranks), request.compute, request.tokens
    in_memory = states.directory is None
    host = in_memory and not states.resident
    shares, held_out_shares = (sum(share.held_out == kind for share in portion.shares) for kind in (False, True))
    sizes = [batch.numel() for batch in portion.batches]
    return Workload(
        tokens=sum(sizes[: portion.held_out_from]),
        held_out=sum(sizes[portion.held_out_from :]),
        batch=max(sizes, default=0),
        sums=max(min(2, shares), 1 + min(2, held_out_shares)),
        streams=2 if run.matching and len(tokens.held_out) else 1,
        linear_bytes=run.linear_dtype(compute).itemsize,
        factor_bytes=compute.factors.itemsize,
        other_bytes=compute.dtype.itemsize,
        sequential=run.sequential,
        statistics=run.algorithm.needs_statistics(run.config),
        states=states.nbytes if host else states.arguments if in_memory else 0,
        rows_per_solve=rows_per_solve(compute.device),
        ranks=request.ranks,
        arguments=states.arguments if in_memory else 0,
        experts=states.experts if host else 0,
        resident=states.nbytes - states.arguments if states.resident else 0,
        resident_experts=states.experts if states.resident else 0,
        on_gpu=compute.device.type != "cpu",
        most_kept=most_kept(compute.device),
    )


def states_of(request: Request, run: Run) -> States:
    """Return the size of this process's hidden states, and where they wait."""
    config, ranks = request.config, request.ranks
    tokens = request.tokens.train.numel() + request.tokens.held_out.numel()
    each = token_bytes(request, run)
    arguments = int(tokens * each.arguments) // ranks.size
    streams = 2 if run.matching else 1
    size = int(tokens * (each.hidden + each.shared)) * streams // ranks.size + arguments
    has_statistics = run.algorithm.needs_statistics(config)
    # With the original model also its inputs, and what the block's output lacks without the experts.
    experts = int(tokens * each.experts) * (2 * streams - 1) // ranks.size if has_statistics else 0
    free, device = free_memory(torch.device("cpu")), request.compute.device
    if config.offload_dir is None and device.type != "cpu":
        there = size - arguments + experts
        if there <= _DEVICE_SHARE * free_memory(device):
            return States(size, None, arguments, experts, resident=True)
    if config.offload_dir is None and (size + experts) * processes_here(ranks) <= _MEMORY_SHARE * free:
        return States(size, None, arguments, experts)
    key = hashlib.sha256(str(config.output.resolve()).encode()).hexdigest()[:12]
    parent = config.offload_dir or unfinished_work(config.output)
    return States(size, parent / f"llmq-{key}-{ranks.rank}.partial", arguments, experts)
