"""The steps of a run: each is on disk before the next begins, and is there for a process that goes on after a crash.

    outside ──► block 0 ──► block 1 ──► … ──► (training)        then the checkpoint is put together, checked and moved

A step is finished when its tensors lie in parts of the Writer and the journal says so. What a later block must know of
an earlier one is its weights, which the parts hold, and the hidden states that leave it, which are computed from those
again unless they wait on disk anyway.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llmq.calibration.block_runner import Block
from llmq.calibration.hidden_states import HiddenDir, StoredStates, new_hidden_dir, remove_states
from llmq.checkpoint.writer import Writer
from llmq.formats.scheme import Scheme
from llmq.run.block_quantizer import Run
from llmq.run.journal import Journal, Line, Step
from llmq.run.prepare import Request

OUTSIDE, TRAINING = "outside the blocks", "training"


class Progress:
    """Where a run is.

    Args:
        writer: in the process that writes, else None.
        steps: what earlier processes finished; the run's report and digests are told of it.
    """

    def __init__(self, run: Run, writer: Writer | None, journal: Journal, steps: Sequence[Step] = ()) -> None:
        self._run, self._writer, self._journal = run, writer, journal
        self._done = [step.finished for step in steps]
        self._open: tuple[str, Block | None, Writer | None] | None = None
        for step in steps:
            self._restore(step)
        if steps:
            seconds = dict(self._done[-1]["seconds"])
            run.clock.go_on(seconds.pop("total"), seconds)
            run.report.resumed.append(self._done[-1]["finished"])
            if writer is not None:
                writer.keep_parts(self.parts)
        self._told, self._told_notes = dict(run.digests), len(run.report.notes)

    def is_done(self, step: str) -> bool:
        return any(line["finished"] == step for line in self._done)

    @property
    def parts(self) -> int:
        """Parts that the writer of the last finished step had written."""
        return self._done[-1]["parts"] if self._done else 0

    def save(
        self,
        step: str,
        tensors: Iterable[Mapping[str, Tensor]],
        block: Block | None = None,
        writer: Writer | None = None,
    ) -> None:
        """Write the tensors of a step, those of one module in one mapping. `commit` finishes the step.

        Args:
            block: whose hidden states go on to the next step.
            writer: for another checkpoint than the one of the steps before.
        """
        writer = writer or self._writer
        with self._run.clock("write"):
            for together in tensors:
                if writer is not None:
                    writer.put(dict(together))
            if writer is not None:
                writer.flush()
        self._open = step, block, writer

    def commit(self) -> None:
        """The step that was saved last, if it is not finished yet, is finished: a new process would go on after it."""
        if self._open is None:
            return
        self._run.ranks.meet()  # what waits on the disks of the others is there, too
        (step, block, writer), report = self._open, self._run.report
        news = {name: value for name, value in self._run.digests.items() if self._told.get(name) != value}
        schemes = {name: self._run.schemes[name] for name in news if name in self._run.schemes}
        line: Line = {
            "finished": step,
            "parts": 0 if writer is None else writer.parts,
            "digests": news,
            "schemes": {name: list(vars(scheme).values()) for name, scheme in schemes.items()},
            "notes": report.notes[self._told_notes :],
            "drift": report.drifts.get(step),
            "refined": report.refined.get(step),
            "distilled": report.distilled,
            "seconds": {"total": self._run.clock.total, **self._run.clock.seconds},
            "states": None if block is None else _states_of(block),
        }
        self._done.append(line)
        self._told |= news
        self._told_notes, self._open = len(report.notes), None
        if writer is not None:
            # Before the line is there: who is interrupted meanwhile must not remove what it speaks of.
            writer.resumable |= step != OUTSIDE  # which is read again in no time
            self._journal.add(line)

    def _restore(self, step: Step) -> None:
        """Know of a step what the process that finished it knew."""
        line, report = step.finished, self._run.report
        report.groups += step.groups
        report.notes += line["notes"]
        report.drifts |= {line["finished"]: line["drift"]} if line["drift"] is not None else {}
        report.refined |= {line["finished"]: tuple(line["refined"])} if line["refined"] is not None else {}
        report.distilled = line["distilled"] and tuple(line["distilled"])
        self._run.digests |= line["digests"]
        self._run.schemes |= {name: Scheme(*fields) for name, fields in line["schemes"].items()}

    def restore_block(self, block: Block) -> None:
        """Give a finished block the weights that it was left with."""
        run, prefix = self._run, block.name + "."
        tensors = run.ranks.first(lambda: self._tensors_of(block.name))
        for name, parameter in block.module.named_parameters():
            if prefix + name in tensors:
                parameter.data = tensors[prefix + name].to(parameter.device, parameter.dtype)
        packed = {name: scheme for name, scheme in run.schemes.items() if name.startswith(prefix)}
        if packed:
            # As a reader of the file would: a format may store other zero points than the scheme that was asked for.
            packed = run.format.schemes_of(run.format.hf_config(packed, []), packed)
        for name, scheme in packed.items():
            weight = run.format.decode(name, tensors, scheme)
            block.replace_weight(name.removeprefix(prefix), weight.dequantize().to(block.compute.device))

    def _tensors_of(self, step: str) -> dict[str, Tensor]:
        """What was saved in a step."""
        assert self._writer is not None
        at = next(i for i, line in enumerate(self._done) if line["finished"] == step)
        return self._writer.read_parts(self._done[at - 1]["parts"] if at else 0, self._done[at]["parts"])

    def hidden_dir_for(self, directory: Path | None) -> HiddenDir | None:
        """Where hidden states wait there, with those that enter the first block that is not finished if they are there.

        They are there for all processes or for none. They were not forced onto the disk: after the machine went down
        they may be anything.
        """
        ranks, found = self._run.ranks, self._done[-1]["states"] if self._done else None
        place = None
        if directory is not None and found is not None:
            place = HiddenDir(directory, found["name"], found["turn"])
        here = False
        if place is not None and found is not None and found["boot"] is not None:
            same = found["boot"] == _boot() and found["ranks"] == ranks.size
            here = same and all(place.files(kind)[found["turn"]].is_file() for kind in found["kinds"])
        name = ranks.first(lambda: secrets.token_hex(4))
        if all(ranks.each(here)):
            return place
        return None if directory is None else new_hidden_dir(directory, name)


def _states_of(block: Block) -> Line | None:
    """How a new process finds the hidden states that leave a block; None if they are in memory."""
    if not isinstance(block.hidden, StoredStates) or block.hidden.complete is None:
        return None
    kinds = ["quantized"] + ["original"] * (block.original is not None)
    about = {"name": block.hidden.hidden_dir.name, "turn": block.hidden.complete, "kinds": kinds}
    return about | {"ranks": block.ranks.size, "boot": _boot()}


def _boot() -> str | None:
    """What changes when the machine starts anew; None where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextmanager
def open_writer(request: Request, states_dir: Path | None) -> Iterator[Writer | None]:
    """Open the output directory for writing, in the first process; others get None.

    If the work inside fails, what can be resumed stays there, and the user is told how. `states_dir`: where hidden
    states are on disk; they are removed if nothing can be resumed.
    """
    config = request.config
    if not request.ranks.is_first:
        yield None
        return
    # If nothing is known of an unfinished run, there is nothing to resume.
    anew = config.overwrite or (config.resume and not request.steps)
    writer = Writer(config.output, anew, resume=bool(request.steps))
    try:
        with writer:
            yield writer
    except BaseException:
        if not writer.resumable:
            remove_states(states_dir)
        elif request.progress:
            print(
                f"\nfinished blocks are kept in {config.output}: add --resume to the command to continue",
                file=sys.stderr,
            )
        raise
