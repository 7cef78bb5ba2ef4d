"""Hidden states of the calibration text that wait on disk, for when memory has no room for them.

    file 0:  inputs of block k      ◄── read
    file 1:  inputs of block k+1    ◄── written, and read from then on

A micro-batch is read and written whole and its copy in the other file is kept until the one after it is written: a run
that is killed within block k still has all inputs of block k. Plain reads and writes, not a mapped file: the pages of
a mapping would count as this program's memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import WorkError


@dataclass(frozen=True)
class HiddenDir:
    """Where the hidden states of a process wait."""

    directory: Path
    name: str
    """What the names of the files begin with: another for every run that begins with none, so that what one run left
    is never taken for what another did."""
    turn: int | None = None
    """Which of the two files holds what is there already (see `complete`); None to begin with none."""

    def files(self, kind: str) -> list[Path]:
        """The two files of one kind of states."""
        return [self.directory / f"{self.name}-{kind}-{turn}.states" for turn in (0, 1)]


def new_hidden_dir(directory: Path, name: str) -> HiddenDir:
    """Make a directory for hidden states, with none in it. Raises WorkError if it cannot be made."""
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.states"):
            path.unlink()
    return HiddenDir(directory, name)


def remove_states(directory: Path | None) -> None:
    """Remove the hidden states in `directory`, and those of this run's other processes on this machine beside it.

    Their directories bear the same name but for the number at its end. None: there are none on disk.
    """
    if directory is not None:
        for each in directory.parent.glob(f"{directory.name.rpartition('-')[0]}-*.partial"):
            shutil.rmtree(each, ignore_errors=True)


class StoredStates:
    """A list of tensors of one dtype whose items are on disk.

    Args:
        hidden_dir: where the two files are, or are made.
        kind: tells them from others there.
        shapes: of all items.

    Raises WorkError if the disk is full, or the files are not what was written.
    """

    def __init__(self, hidden_dir: HiddenDir, kind: str, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        self.hidden_dir = hidden_dir
        self._shapes, self._dtype = list(shapes), dtype
        sizes = [shape.numel() * dtype.itemsize for shape in self._shapes]
        self._offsets = [0, *accumulate(sizes)]
        with _explained(hidden_dir.directory):
            self._files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in hidden_dir.files(kind)]
        self._turns = [hidden_dir.turn or 0] * len(sizes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> Tensor:
        shape = self._shapes[i]  # an IndexError ends a loop over all
        tensor = torch.empty(shape, dtype=self._dtype)
        view, file = _bytes(tensor), self._files[self._turns[i]]
        at = self._offsets[i]
        with _explained(self.hidden_dir.directory):
            while view:
                count = os.preadv(file, [view], at)
                if count == 0:
                    raise OSError("a file is shorter than it was written")
                view, at = view[count:], at + count
        return tensor

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        assert tensor.shape == self._shapes[i], (tensor.shape, self._shapes[i])
        turn = 1 - self._turns[i]
        view, at = _bytes(tensor.to(self._dtype).contiguous()), self._offsets[i]
        with _explained(self.hidden_dir.directory):
            while view:
                count = os.pwrite(self._files[turn], view, at)
                view, at = view[count:], at + count
        self._turns[i] = turn

    @property
    def complete(self) -> int | None:
        """The file that holds all items; None while they are spread over both."""
        return self._turns[0] if len(set(self._turns)) == 1 else None

    def close(self) -> None:
        """Close the files, which stay. May be called twice."""
        while self._files:
            os.close(self._files.pop())


HiddenStates = list[Tensor] | StoredStates
"""Micro-batches [samples, tokens, features] on the CPU, in memory or on disk."""


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkError(f"hidden states cannot wait in {directory}: {error}; name another --offload-dir") from None


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).flatten().numpy()
    return memoryview(array)
