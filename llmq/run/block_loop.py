"""Quantizes the blocks of a model one after the other, and saves each before the next one begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from llmq.calibration.block_stream import Journey, stream
from llmq.calibration.hidden_states import remove_states
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.run.resume import OUTSIDE, Progress


def quantize_blocks(
    request: Request, run: Run, progress: Progress, states_dir: Path | None, states_nbytes: int
) -> None:
    """Save all tensors of the model: those outside the blocks, then block by block. Finished steps are not repeated.

    One block is in memory at a time.

    Args:
        states_dir: where hidden states wait on disk; None keeps them in memory.
        states_nbytes: their size.
    """
    names = request.source.block_names
    if not progress.is_done(OUTSIDE):
        progress.save(OUTSIDE, _outside(run))
        progress.commit()
    if states_dir is not None and request.config.offload_dir is None and not request.steps:
        size = f"{states_nbytes / 1e9:.1f} GB, more than a quarter of free memory"
        run.report.note("model", [f"hidden states wait on disk: {size}"])
    stop = names.index(run.chosen[-1]) + 1
    _quantize_chosen(request, run, progress, states_dir, stop)
    for name in names[stop:]:
        if not progress.is_done(name):
            progress.save(name, _untouched(run, name))
            progress.commit()
    run.ranks.meet()  # no process needs its hidden states any more
    remove_states(states_dir)


def _quantize_chosen(request: Request, run: Run, progress: Progress, states_dir: Path | None, stop: int) -> None:
    """Send the hidden states through the first `stop` blocks, and quantize those that are chosen and not finished."""
    finished = sum(map(progress.is_done, request.source.block_names[:stop]))
    if finished == stop:
        return
    journey = Journey(
        keep_original=run.matching,
        ranks=run.ranks,
        stop=stop,
        linears=run.linear_dtype(request.compute),
        states_unused=not run.algorithm.needs_statistics(run.config),
        finished=finished,
        restore=progress.restore_block,
        passed=progress.commit,
        hidden_dir=progress.hidden_dir_for(states_dir),
    )
    with closing(stream(request.source, request.tokens, request.compute, request.clock, journey)) as blocks:
        bar = tqdm(blocks, "blocks", total=stop, initial=finished, disable=not request.progress, unit="block")
        for block in bar:
            progress.save(block.name, [run.quantize_block(block, bar.set_postfix_str)], block)


def _outside(run: Run) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors outside the blocks one at a time, in the process that writes."""
    for name in run.source.outer_names() if run.ranks.is_first else ():
        yield run.unchanged({name: run.source.read(name)})


def _untouched(run: Run, block: str) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a block that is not quantized, module by module, in the process that writes."""
    names = run.source.block_tensor_names(block) if run.ranks.is_first else []
    for _, of_module in groupby(names, key=lambda name: name.rpartition(".")[0]):
        yield run.unchanged({name: run.source.read(name) for name in of_module})
