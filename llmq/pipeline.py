"""The main road: source -> stream of blocks -> algorithm -> QuantizedWeight -> format -> checkpoint on disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llmq.blockwise import Run
from llmq.check import DIGESTS, check
from llmq.checkpoint import Checkpoint
from llmq.companions import companions_of
from llmq.config import QuantizeConfig
from llmq.device import pick_device
from llmq.digest import digests_of
from llmq.distill import Student, distill
from llmq.errors import WorkError
from llmq.journal import Journal
from llmq.memory import release_memory
from llmq.output import PROGRESS, remove_leftovers
from llmq.plan import States, check_plan, lines, plan_of, prove
from llmq.plot import draw
from llmq.progress import OUTSIDE, TRAINING, Progress
from llmq.ranks import joined_ranks, local_rank
from llmq.request import FINGERPRINT, Request, open_request, whole_model
from llmq.stream import Journey, stream
from llmq.writer import Writer


def quantize(config: QuantizeConfig, progress: bool = False) -> Path:
    """Quantize a model and write a packed checkpoint; returns its directory.

    Started by a launcher of several processes, all of them call this and work together; the first writes.

    Of a dry run there is a plan on stdout, and nothing else.

    Args:
        progress: show a progress bar and the table of the worst layers on stderr.

    Raises RequestError before any work for what cannot be asked for, WorkError for what fails on the way;
    in both cases nothing that looks like a checkpoint is left in the output directory. What was finished by then is
    left there for `resume`.
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
    config, ranks = request.config, request.ranks
    journal = Journal(config.output / PROGRESS if ranks.is_first else None)
    run = Run(config, request.source, request.compute.device, request.clock, ranks, journal.add)
    plan = plan_of(request, run, timed=config.dry_run)
    if config.dry_run and ranks.is_first:
        print(*lines(plan), sep="\n")
    check_plan(plan)
    if config.dry_run:
        return None
    if ranks.is_first and not request.steps:
        with run.clock("proof"):
            prove(run)
    with _writer(request, plan.states) as writer:
        # All wait for the first one: until the output is its own, nobody touches that.
        if ranks.first(lambda: writer is not None and writer.is_checked):
            return writer.publish() if writer is not None else None
        journal.begin(request.fingerprint, request.steps)
        request.keep_tokens()
        if config.end_to_end and writer is not None:
            _two_checkpoints(request, run, writer, journal, plan.states)
        else:
            _block_by_block(request, run, Progress(run, writer, journal, request.steps), plan.states)
        _finish(request, run, writer)
    if request.progress:
        run.report.show(config.output)
    return None


def _two_checkpoints(request: Request, run: Run, writer: Writer, journal: Journal, states: States) -> None:
    """One is made block by block; training makes another of it, which is the result."""
    with writer.workroom() as first:
        progress = Progress(run, first, journal, request.steps)
        if not progress.is_done(TRAINING):
            if first.is_checked:
                first.publish()
            if not first.is_finished:
                _block_by_block(request, run, progress, states)
                _finish(request, run, first)
            _end_to_end(request, run, first.directory, writer, progress)
    writer.keep_parts(progress.parts)


@contextmanager
def _writer(request: Request, states: States) -> Iterator[Writer | None]:
    """The writer, in the first process; what is left when the work inside fails, is said."""
    config = request.config
    if not request.ranks.is_first:
        yield None
        return
    # An unfinished run of which nothing is known is as good as none.
    anew = config.overwrite or (config.resume and not request.steps)
    writer = Writer(config.output, anew, resume=bool(request.steps))
    try:
        with writer:
            yield writer
    except BaseException:
        if not writer.resumable:
            _forget(states)
        elif request.progress:
            print(
                f"\nwhat is finished is kept: the same command with --resume goes on in {config.output}",
                file=sys.stderr,
            )
        raise


def _block_by_block(request: Request, run: Run, progress: Progress, states: States) -> None:
    """Quantize all blocks, of which only one is in memory at a time. `states`: where hidden states wait."""
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
        journey = Journey(
            keep_original=run.matching,
            ranks=run.ranks,
            stop=stop,
            linears=run.linear_dtype(request.compute),
            states_unused=not run.algorithm.needs_statistics(run.config),
            finished=finished,
            restore=progress.restore_block,
            passed=progress.commit,
            place=progress.place_of_states(states.directory),
        )
        blocks = stream(source, request.tokens, request.compute, request.clock, journey)
        with closing(blocks):
            bar = tqdm(blocks, "blocks", total=stop, initial=finished, disable=not request.progress, unit="block")
            for block in bar:
                progress.save(block.name, [run.quantize_block(block, bar.set_postfix_str)], block)
    for name in names[stop:]:
        if not progress.is_done(name):
            progress.save(name, run.untouched(name))
            progress.commit()
    run.ranks.meet()  # no process needs its hidden states any more
    _forget(states)


def _forget(states: States) -> None:
    """Remove what waits on disk, also of other processes on this machine, of this run or an earlier one."""
    directory = states.directory
    if directory is not None:
        for each in directory.parent.glob(f"{directory.name.rpartition('-')[0]}-*.partial"):
            shutil.rmtree(each, ignore_errors=True)


def _end_to_end(request: Request, run: Run, directory: Path, writer: Writer, progress: Progress) -> None:
    """Train the whole checkpoint in `directory`, and write it as the result."""
    config, compute = run.config, request.compute
    with run.clock("distill"):
        release_memory()
        try:
            original = whole_model(config, device=compute.device, dtype=compute.dtype)
            student = Student(directory, original, compute, config.trust_remote_code)
            changed, run.report.distilled = distill(
                student, original, request.training, config.tuned, compute, request.progress
            )
        except torch.OutOfMemoryError:
            raise WorkError(
                "training the whole model does not fit into the GPU's memory.\n"
                "--tuned.end-rate 0 (the default) and --tuned.end-batch 1 need less; "
                "--tuned.end-steps 0 --tuned.steps 100 trains one block after the other"
            ) from None
    checkpoint = Checkpoint(directory)
    files, run.digests = checkpoint.files, digests_of(checkpoint, changed)

    def tensors() -> Iterator[dict[str, Tensor]]:
        # Those of one module stay together.
        for _, names in groupby(sorted(files.names()), key=lambda name: name.rpartition(".")[0]):
            yield {name: changed[name] if name in changed else files.read(name) for name in names}

    progress.save(TRAINING, tensors(), writer=writer)
    progress.commit()


def _finish(request: Request, run: Run, writer: Writer | None) -> None:
    if writer is None:
        return

    def read_back(directory: Path) -> None:
        with run.clock("check"):
            check(directory, run.digests, run.config.trust_remote_code)

    def report() -> dict[str, Any]:
        return run.report.to_json() | {DIGESTS: run.digests, FINGERPRINT: request.fingerprint}

    writer.finish(companions_of(run.source), run.source.dtype, run.hf_config(), report, read_back)
