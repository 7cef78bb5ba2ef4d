"""The main road, from a model on disk to a packed checkpoint on disk. Read this file first.

    prepare ──► plan ──► blocks, one after the other ──► (training of the whole model) ──► check, publish
    run/        plan/    calibration/  statistics of      run/end_to_end.py              verification/
    models/              algorithms/   codes and scales                                  checkpoint/
                         formats/      packed tensors
                         checkpoint/   files on disk

Each block is on disk before the next one begins, so a run that was interrupted can be resumed: see run/resume.py.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llmq.calibration.hidden_states import States
from llmq.checkpoint.output_dir import PROGRESS, remove_leftovers, unfinished_work
from llmq.checkpoint.writer import Writer
from llmq.core.config import QuantizeConfig
from llmq.core.device import full_float32, pick_device
from llmq.core.distributed import joined_ranks, local_rank
from llmq.plan import check_plan, lines, plan_of
from llmq.run.bit_budget import check_budget, kept_units, spend, table
from llmq.run.block_loop import finish, quantize_blocks
from llmq.run.block_quantizer import Run
from llmq.run.end_to_end import quantize_and_train
from llmq.run.format_roundtrip import prove
from llmq.run.gguf_export import export
from llmq.run.journal import Journal
from llmq.run.prepare import Request, open_request
from llmq.run.report_plot import draw
from llmq.run.resume import Progress, open_writer


def quantize(config: QuantizeConfig, progress: bool = False) -> Path:
    """Quantize a model and write a packed checkpoint; returns its directory. A dry run only prints a plan on stdout.

    If a launcher (torchrun) started several processes, all of them call this and share the work; the first one writes.

    `progress`: show a progress bar and the table of the worst layers on stderr.

    Raises RequestError before any work if the request is wrong, WorkError if the work fails. In both cases nothing in
    the output directory looks like a finished checkpoint. Finished blocks stay there, and `resume` continues with them.
    """
    device = pick_device(config.device, local_rank())
    with joined_ranks(device) as ranks, torch.no_grad(), full_float32():
        request = open_request(config, device, ranks, progress and ranks.is_first)
        if not request.is_met:
            _plan_and_work(request)
        elif ranks.is_first and not config.dry_run:
            remove_leftovers(config.output)
        if request.is_met and request.progress:
            print(f"{config.output} holds the finished checkpoint already", file=sys.stderr)
        if config.plot and ranks.is_first and not config.dry_run:
            draw(config.output)
    return config.output


def _plan_and_work(request: Request) -> None:
    """Plan the run, refuse what does not fit, then do the work. A dry run prints the plan and ends."""
    config, ranks = request.config, request.ranks
    journal = Journal(config.output / PROGRESS if ranks.is_first else None)
    run = Run(config, request.source, request.compute.device, request.clock, ranks, journal.add)
    plan, choice = plan_of(request, run, timed=config.dry_run), None
    if config.spending is not None:
        check_plan(plan)  # measuring takes minutes and memory
        check_budget(request, run, plan.units)
    if config.dry_run and config.spending is not None:
        before = request.clock.total
        choice = spend(request, run)
        seconds = plan.seconds | {"measuring": request.clock.total - before}
        plan = replace(plan_of(request, run), seconds=seconds, probe=plan.probe, busy=plan.busy)
    if config.dry_run and ranks.is_first:
        print(*lines(plan), *(table(choice) if choice else ()), sep="\n")
    check_plan(plan)
    if not config.dry_run:
        _work(request, run, journal, plan.states, plan.units)


def _work_into(request: Request, run: Run, writer: Writer | None, journal: Journal, states: States) -> None:
    """Write a checkpoint into the directory of a writer, in the process that has one."""
    if request.config.end_to_end and writer is not None:
        quantize_and_train(request, run, writer, journal, states)
    else:
        progress = Progress(run, writer, journal, request.steps)
        quantize_blocks(request, run, progress, states)
    finish(request, run, writer)


def _work_into_gguf(request: Request, run: Run, writer: Writer | None, journal: Journal, states: States) -> None:
    """Write a first checkpoint block by block into a workroom, and make a .gguf file of it.

    If an interrupted run got that far, the first checkpoint is there already.
    """
    with nullcontext() if writer is None else writer.workroom() as first:
        if not request.ranks.first(lambda: first is not None and first.is_finished):
            _work_into(request, run, first, journal, states)
        if writer is not None and first is not None:
            with run.clock("gguf"):
                writer.finish_gguf(partial(export, request, run, first.directory))


def _work(request: Request, run: Run, journal: Journal, states: States, units: Sequence[tuple[str, ...]] = ()) -> None:
    """Quantize the model into the output directory.

    Args:
        states: the size of the hidden states, and where they wait.
        units: the names of the linears that must share their bits, for a run with a budget.
    """
    ranks, losses, measured = request.ranks, unfinished_work(request.config.output) / "losses.json", None
    if request.config.spending is not None:
        measured = ranks.first(lambda: kept_units(request, losses, units))
    if ranks.is_first and not request.steps:
        with run.clock("proof"):
            prove(run)
    with open_writer(request, states.directory) as writer:
        # The other processes wait here until the first one has claimed the output directory.
        is_checked = ranks.first(lambda: writer is not None and writer.is_checked)
        if is_checked:  # an earlier process did all but move the checkpoint to its place
            if writer is not None:
                writer.publish()
            return
        journal.begin(request.fingerprint, request.steps)
        request.keep_tokens()
        if request.config.spending is not None:
            spend(request, run, measured, losses)
            if writer is not None:
                writer.resumable = True  # the losses need not be measured again
        if request.config.stored_as == "gguf":
            _work_into_gguf(request, run, writer, journal, states)
        else:
            _work_into(request, run, writer, journal, states)
    if request.progress:
        run.report.show(request.config.output)
