"""The steps of a run. Each is on disk before the next one begins, so that a later process can resume after a crash.

    outside ──► block 0 ──► block 1 ──► … ──► (training)        then the checkpoint is joined, checked and moved

A step is finished once its tensors are in parts of the Writer and its line is in the journal. A later block needs two
things of the blocks before it: their weights, which the parts hold, and the hidden states that leave the last of them.
Hidden states are computed again from the weights, unless they wait on disk.
"""

import secrets
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llmq.calibration.block_runner import Block
from llmq.calibration.hidden_states import HiddenDir, StoredStates, new_hidden_dir, remove_states
from llmq.checkpoint.writer import Writer
from llmq.run.block_quantizer import Run
from llmq.run.journal import FinishedStep, Journal, Line, Step
from llmq.run.prepare import Request

OUTSIDE, TRAINING = "outside the blocks", "training"


class Progress:
    """Knows which steps are finished, and finishes them.

    Args:
        writer: where the tensors go; None in processes that do not write.
        steps: what earlier processes finished. Their entries go into the run's report and digests.
    """

    def __init__(self, run: Run, writer: Writer | None, journal: Journal, steps: Sequence[Step] = ()) -> None:
        self._run, self._writer, self._journal = run, writer, journal
        self._done = [FinishedStep.from_json(step.finished) for step in steps]
        self._open: tuple[str, Block | None, Writer | None] | None = None
        """What `save` was last called with, until it is committed."""
        for step in steps:
            run.report.groups += step.groups
        for step in self._done:
            self._restore(step)
        if self._done:
            seconds = dict(self._done[-1].seconds)
            run.clock.go_on(seconds.pop("total"), seconds)
            run.report.resumed.append(self._done[-1].name)
            if writer is not None:
                writer.keep_parts(self.parts)
        self._told, self._told_notes = dict(run.tensors.digests), len(run.report.notes)
        """The digests and the number of notes that the journal knows already."""

    def _restore(self, step: FinishedStep) -> None:
        """Tell the run what the process that finished a step knew of it."""
        report = self._run.report
        report.notes += step.notes
        report.drifts |= {} if step.drift is None else {step.name: step.drift}
        report.refined |= {} if step.refined is None else {step.name: step.refined}
        report.distilled = step.distilled
        if report.budget is not None and step.measured_kl is not None:
            report.budget["measured_kl"] = step.measured_kl
        self._run.tensors.digests |= step.digests
        self._run.tensors.schemes |= step.schemes

    def is_done(self, name: str) -> bool:
        """Return whether the step of this name is finished."""
        return any(step.name == name for step in self._done)

    @property
    def parts(self) -> int:
        """Return how many parts were written when the last finished step ended."""
        return self._done[-1].parts if self._done else 0

    def save(
        self, name: str, tensors: Iterable[dict[str, Tensor]], block: Block | None = None, writer: Writer | None = None
    ) -> None:
        """Write the tensors of a step. Call `commit` afterwards to finish it.

        Args:
            tensors: one mapping for each module.
            block: the block, if the next step needs the hidden states that leave it.
            writer: where the tensors go, if not to the usual writer.
        """
        writer = writer or self._writer
        for of_module in tensors:  # an iterator may compute them only now
            with self._run.clock("write"):
                if writer is not None:
                    writer.put(of_module)
        with self._run.clock("write"):
            if writer is not None:
                writer.flush()
        self._open = name, block, writer

    def commit(self) -> None:
        """Finish the step that was saved last: a resumed run continues after it. Does nothing if that is done."""
        if self._open is None:
            return
        self._run.ranks.meet()  # now the hidden states of all processes are on their disks, too
        (name, block, writer), run, report = self._open, self._run, self._run.report
        digests = {tensor: value for tensor, value in run.tensors.digests.items() if self._told.get(tensor) != value}
        step = FinishedStep(
            name=name,
            parts=0 if writer is None else writer.parts,
            digests=digests,
            schemes={name: scheme for name, scheme in run.tensors.schemes.items() if self._stored(name) in digests},
            notes=report.notes[self._told_notes :],
            drift=report.drifts.get(name),
            refined=report.refined.get(name),
            distilled=report.distilled,
            seconds={"total": run.clock.total, **run.clock.seconds},
            states=None if block is None else _states_of(block),
            measured_kl=(report.budget or {}).get("measured_kl"),
        )
        self._done.append(step)
        self._told |= digests
        self._told_notes, self._open = len(report.notes), None
        if writer is not None:
            # Set before the line is written: once it is there, an interrupted run must keep the parts it refers to.
            # The first step is no reason to keep anything: its tensors are read again in no time.
            writer.resumable |= name != OUTSIDE
            self._journal.add(step.to_json())

    def restore_block(self, block: Block) -> None:
        """Give a finished block the weights that an earlier process computed."""
        run, prefix = self._run, block.name + "."
        tensors = run.ranks.first(lambda: self._tensors_of(block.name))
        files = run.source.files
        for inner, parameter in block.module.named_parameters():
            name = prefix + inner
            place = files.stored_names(name)[0] if files.is_renamed(name) else name
            if place in tensors:
                parameter.data = files.turned(name, tensors[place]).to(parameter.device, parameter.dtype)
        schemes = {name: scheme for name, scheme in run.tensors.schemes.items() if name.startswith(prefix)}
        if schemes:
            # As a reader of the file sees them: a format may store other zero points than the scheme asked for.
            schemes = run.format.schemes_of(run.format.hf_config(schemes, []), schemes)
        for name, scheme in schemes.items():
            weight = run.format.decode(self._stored(name), tensors, scheme)
            block.replace_weight(name.removeprefix(prefix), weight.dequantize().to(block.compute.device))

    def _stored(self, linear: str) -> str:
        return self._run.source.files.stored_linear(linear)

    def _tensors_of(self, name: str) -> dict[str, Tensor]:
        assert self._writer is not None
        at = next(i for i, step in enumerate(self._done) if step.name == name)
        return self._writer.read_parts(self._done[at - 1].parts if at else 0, self._done[at].parts)

    def hidden_dir_for(self, directory: Path | None) -> HiddenDir | None:
        """Return where the hidden states of this process wait in `directory`; None if they stay in memory.

        If the states that enter the next block are there already, in all processes, they are used. After a restart of
        the machine they are not: nobody made sure that they reached the disk.
        """
        ranks, states = self._run.ranks, self._done[-1].states if self._done else None
        new_name = ranks.first(lambda: secrets.token_hex(4))
        kept, is_sound = None, False
        if directory is not None and states is not None:
            kept = HiddenDir(directory, states["name"], states["turn"])
            is_same = states["boot"] is not None and (states["boot"], states["ranks"]) == (_boot(), ranks.size)
            is_sound = is_same and all(kept.files(kind)[states["turn"]].is_file() for kind in states["kinds"])
        if all(ranks.each(is_sound)):
            return kept
        return None if directory is None else new_hidden_dir(directory, new_name)


def _states_of(block: Block) -> Line | None:
    """Return how a later process finds the hidden states that leave a block; None if they are in memory."""
    hidden = block.hidden
    if block.shared is not None and not block.shared.is_empty:  # that has no second copy: it is computed again
        return None
    if not isinstance(hidden, StoredStates) or hidden.complete is None:
        return None
    kinds = ["quantized"] + ["original"] * (block.original is not None)
    files = {"name": hidden.hidden_dir.name, "turn": hidden.complete, "kinds": kinds}
    return files | {"ranks": block.ranks.size, "boot": _boot()}


def _boot() -> str | None:
    """Return what changes when the machine is restarted; None if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextmanager
def open_writer(request: Request, states_dir: Path | None) -> Generator[Writer | None]:
    """Open the output directory for writing in the first process; give None to the others.

    If the work inside fails, what can be resumed stays there, and the user is told how to resume.

    `states_dir`: where hidden states are on disk. They are removed if nothing can be resumed.
    """
    config = request.config
    if not request.ranks.is_first:
        yield None
        return
    # If nothing is known of an unfinished run, there is nothing to resume.
    anew = config.overwrite or (config.resume and not request.steps)
    writer = Writer(config.output, anew, resume=bool(request.steps))
    is_open = False  # before, another run may be writing here: its hidden states stay
    try:
        with writer:
            is_open = True
            yield writer
    except BaseException:
        if is_open and not writer.resumable:
            remove_states(states_dir)
        elif is_open and request.progress:
            hint = "add --resume to the command to continue"
            print(f"\nfinished blocks are kept in {config.output}: {hint}", file=sys.stderr)
        raise
