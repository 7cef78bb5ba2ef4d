"""Writes a checkpoint: saves block after block as they are quantized, then checks the whole and publishes it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llmq.calibration.block_stream import StreamSettings, stream
from llmq.calibration.hidden_states import States, remove_states
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.models.packed_share import packed_share
from llmq.run.block_quantizer import Run
from llmq.run.prepare import FINGERPRINT, Request
from llmq.run.resume import OUTSIDE, Progress
from llmq.run.sensitivity import held_out_loss
from llmq.verification.check import DIGESTS, check, tokenizer_fault


def quantize_blocks(request: Request, run: Run, progress: Progress, states: States) -> None:
    """Save all tensors of the model, first those outside the blocks, then block by block. Finished steps are left out.

    One block is in memory at a time. `states`: where hidden states wait.
    """
    names = request.source.block_names
    if not progress.is_done(OUTSIDE):
        if carried := request.source.carried_names:
            model = type(request.source.skeleton).__name__
            listed = ", ".join(carried[:3]) + ", …" * (len(carried) > 3)
            run.report.note("model", [f"{len(carried)} tensors without a place in {model} are copied: {listed}"])
        progress.save(OUTSIDE, _unchanged(run, [*request.source.outer_names(), *carried], lambda name: name))
        progress.commit()
    if states.directory is not None and request.config.offload_dir is None and not request.steps:
        size = f"{states.nbytes / 1e9:.1f} GB, more than a quarter of free memory"
        run.report.note("model", [f"hidden states wait on disk: {size}"])
    stop = names.index(run.chosen[-1]) + 1
    _quantize_chosen(request, run, progress, states, stop)
    for name in names[stop:]:
        if not progress.is_done(name):
            tensors = request.source.block_tensor_names(name)
            progress.save(name, _unchanged(run, tensors, lambda tensor: tensor.rpartition(".")[0]))
            progress.commit()
    run.ranks.meet()  # no process needs its hidden states any more
    remove_states(states.directory)


def _quantize_chosen(request: Request, run: Run, progress: Progress, states: States, stop: int) -> None:
    """Send the hidden states through the first `stop` blocks, and quantize those that are chosen and not finished."""
    finished = sum(map(progress.is_done, request.source.block_names[:stop]))
    if finished == stop:
        return
    settings = StreamSettings(
        keep_original=run.matching,
        ranks=run.ranks,
        stop=stop,
        linears=run.linear_dtype(request.compute),
        states_unused=not run.algorithm.needs_statistics(run.config),
        finished=finished,
        restore=progress.restore_block,
        passed=progress.commit,
        hidden_dir=progress.hidden_dir_for(states.directory),
        resident=states.resident,
    )
    with closing(stream(request.source, request.tokens, request.compute, request.clock, settings)) as blocks:
        bar = tqdm(blocks, "blocks", total=stop, initial=finished, disable=not request.progress, unit="block")
        for block in bar:
            progress.save(block.name, run.quantize_block(block, bar.set_postfix_str), block)
            if run.report.budget is not None and block.name == request.source.block_names[-1]:
                run.report.budget["measured_kl"] = held_out_loss(request, run, block)


def _unchanged(run: Run, names: Iterable[str], unit: Callable[[str], str]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors as they are stored, in the process that writes. Those with the same `unit` come together."""
    for _, together in groupby(names if run.ranks.is_first else (), unit):
        yield run.tensors.stored(together)


def finish(request: Request, run: Run, writer: Writer | None) -> None:
    """Read the checkpoint back, check it, and publish it with its report, in the process that writes.

    Raises CheckpointError if the files are not what was computed. Then nothing is published.
    """
    if writer is None:
        return
    run.report.packed = packed_share(run.source.skeleton, run.chosen, run.tensors.schemes)

    def read_back(directory: Path) -> None:
        with run.clock("check"):
            check(directory, run.tensors.digests, run.config.trust_remote_code)
            if reason := tokenizer_fault(directory, run.config.trust_remote_code):
                run.report.note("model", [f"the tokenizer of the result cannot be opened: {reason}"])

    def report() -> dict[str, Any]:
        return run.report.to_json() | {DIGESTS: run.tensors.digests, FINGERPRINT: request.fingerprint}

    config = run.tensors.hf_config(run.report.notes[-1]["note"] if run.report.notes else "")
    writer.finish(companions_of(run.source), run.source.dtype, config, report, read_back)
