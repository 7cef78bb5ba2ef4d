"""The main road, from a model on disk to a packed checkpoint on disk. Read this file first.

    prepare ──► plan ──► blocks, one after the other ──► (training of the whole model) ──► check, publish
    run/        plan/    calibration/  statistics of      run/end_to_end.py              verification/
    models/              algorithms/   codes and scales                                  checkpoint/
                         formats/      packed tensors
                         checkpoint/   files on disk

Each block is on disk before the next one begins, so a run that was interrupted can be resumed: see run/resume.py.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmq.calibration.block_stream import StreamSettings, stream
from llmq.calibration.hidden_states import remove_states
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.output_dir import PROGRESS, remove_leftovers
from llmq.checkpoint.writer import Writer
from llmq.core.config import QuantizeConfig
from llmq.core.device import pick_device
from llmq.core.distributed import joined_ranks, local_rank
from llmq.plan import States, check_plan, lines, plan_of
from llmq.run.block_quantizer import Run
from llmq.run.end_to_end import train_end_to_end
from llmq.run.format_roundtrip import prove
from llmq.run.journal import Journal
from llmq.run.prepare import FINGERPRINT, Request, open_request
from llmq.run.report_plot import draw
from llmq.run.resume import OUTSIDE, TRAINING, Progress, open_writer
from llmq.verification.check import DIGESTS, check


def quantize(config: QuantizeConfig, progress: bool = False) -> Path:
    """Quantize a model and write a packed checkpoint; returns its directory. A dry run only prints a plan on stdout.

    If a launcher (torchrun) started several processes, all of them call this and share the work; the first one writes.

    Args:
        progress: show a progress bar and the table of the worst layers on stderr.

    Raises RequestError before any work if the request is wrong, WorkError if the work fails. In both cases nothing in
    the output directory looks like a finished checkpoint. Finished blocks stay there, and `resume` continues with them.
    """
    device = pick_device(config.device, local_rank())
    with joined_ranks(device) as ranks, torch.no_grad():
        request = open_request(config, device, ranks, progress and ranks.is_first)
        if not request.is_met:
            _work(request)
        elif ranks.is_first and not config.dry_run:
            remove_leftovers(config.output)
        if request.is_met and request.progress:
            print(f"{config.output} holds the whole result already", file=sys.stderr)
        if config.plot and ranks.is_first and not config.dry_run:
            draw(config.output)
    return config.output


def _work(request: Request) -> None:
    """Plan the run, refuse what does not fit, then do it."""
    config, ranks = request.config, request.ranks
    journal = Journal(config.output / PROGRESS if ranks.is_first else None)
    run = Run(config, request.source, request.compute.device, request.clock, ranks, journal.add)
    plan = plan_of(request, run, timed=config.dry_run)
    if config.dry_run and ranks.is_first:
        print(*lines(plan), sep="\n")
    check_plan(plan)
    if config.dry_run:
        return
    if ranks.is_first and not request.steps:
        with run.clock("proof"):
            prove(run)
    with open_writer(request, plan.states.directory) as writer:
        # The other processes wait here until the first one has claimed the output directory.
        if ranks.first(lambda: writer is not None and writer.is_checked):
            if writer is not None:
                writer.publish()
            return
        journal.begin(request.fingerprint, request.steps)
        request.keep_tokens()
        if config.end_to_end and writer is not None:
            _quantize_and_train(request, run, writer, journal, plan.states)
        else:
            _quantize_blocks(request, run, Progress(run, writer, journal, request.steps), plan.states)
        _finish(request, run, writer)
    if request.progress:
        run.report.show(config.output)


def _quantize_and_train(request: Request, run: Run, writer: Writer, journal: Journal, states: States) -> None:
    """Write a first checkpoint block by block into a workroom, train it as a whole, write the trained one."""
    with writer.workroom() as first:
        progress = Progress(run, first, journal, request.steps)
        if not progress.is_done(TRAINING):
            if first.is_checked:
                first.publish()
            if not first.is_finished:
                _quantize_blocks(request, run, progress, states)
                _finish(request, run, first)
            train_end_to_end(request, run, first.directory, writer, progress)
    writer.keep_parts(progress.parts)


def _quantize_blocks(request: Request, run: Run, progress: Progress, states: States) -> None:
    """Quantize all chosen blocks, with one block in memory at a time. `states`: where hidden states are kept."""
    source, names = request.source, request.source.block_names
    if not progress.is_done(OUTSIDE):
        progress.save(OUTSIDE, run.outside())
        progress.commit()
    if states.directory is not None and request.config.offload_dir is None and not request.steps:
        what = f"hidden states wait on disk: {states.nbytes / 1e9:.1f} GB, more than a quarter of free memory"
        run.report.note("model", [what])
    stop = names.index(run.chosen[-1]) + 1
    finished = sum(map(progress.is_done, names[:stop]))
    if finished < stop:
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
        )
        with closing(stream(source, request.tokens, request.compute, request.clock, settings)) as blocks:
            bar = tqdm(blocks, "blocks", total=stop, initial=finished, disable=not request.progress, unit="block")
            for block in bar:
                progress.save(block.name, [run.quantize_block(block, bar.set_postfix_str)], block)
    for name in names[stop:]:
        if not progress.is_done(name):
            progress.save(name, run.untouched(name))
            progress.commit()
    run.ranks.meet()  # no process needs its hidden states any more
    remove_states(states.directory)


def _finish(request: Request, run: Run, writer: Writer | None) -> None:
    """Read the checkpoint back, check it, and publish it with its report."""
    if writer is None:
        return

    def read_back(directory: Path) -> None:
        with run.clock("check"):
            check(directory, run.digests, run.config.trust_remote_code)

    def report() -> dict[str, Any]:
        return run.report.to_json() | {DIGESTS: run.digests, FINGERPRINT: request.fingerprint}

    writer.finish(companions_of(run.source), run.source.dtype, run.hf_config(), report, read_back)
