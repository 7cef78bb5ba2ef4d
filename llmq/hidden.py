"""Hidden states of the calibration text that wait on disk, for when memory has no room for them.

    file 0:  inputs of block k      ◄── read
    file 1:  inputs of block k+1    ◄── written, and read from then on

A micro-batch is read and written whole and its place in the other file is kept until the one after it is written: a run
that is killed within block k still has all inputs of block k. Plain reads and writes, not a mapped file: the pages of
a mapping would count as this program's memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StoredStates:
    """A list of tensors of one dtype whose items are on disk.

    Args:
        directory: where the two files are, or are made.
        name: their names begin with it.
        shapes: of all items.
        turn: which of two files holds what is there, for files that are (see `complete`); None to begin with none.

    Raises OSError if the disk is full.
    """

    def __init__(
        self, directory: Path, name: str, shapes: Sequence[torch.Size], dtype: torch.dtype, turn: int | None = None
    ) -> None:
        self._shapes, self._dtype = list(shapes), dtype
        sizes = [shape.numel() * dtype.itemsize for shape in self._shapes]
        *self._offsets, self.nbytes = accumulate(sizes, initial=0)
        self.paths = [stored_files(directory, [name], i)[0] for i in (0, 1)]
        if turn is None:
            for path in self.paths:
                path.unlink(missing_ok=True)
        self._files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in self.paths]
        self._turns = [turn or 0] * len(sizes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> Tensor:
        shape = self._shapes[i]  # an IndexError ends a loop over all
        tensor = torch.empty(shape, dtype=self._dtype)
        view, file = _bytes(tensor), self._files[self._turns[i]]
        at = self._offsets[i]
        while view:
            count = os.preadv(file, [view], at)
            if count == 0:
                raise OSError(f"{self.paths[self._turns[i]]} is shorter than it was written")
            view, at = view[count:], at + count
        return tensor

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        assert tensor.shape == self._shapes[i], (tensor.shape, self._shapes[i])
        turn = 1 - self._turns[i]
        view, at = _bytes(tensor.to(self._dtype).contiguous()), self._offsets[i]
        while view:
            count = os.pwrite(self._files[turn], view, at)
            view, at = view[count:], at + count
        self._turns[i] = turn

    @property
    def complete(self) -> int | None:
        """The file that holds all items; None while they are spread over both."""
        return self._turns[0] if len(set(self._turns)) == 1 else None

    def close(self) -> None:
        """Close and remove the files."""
        for file, path in zip(self._files, self.paths, strict=True):
            os.close(file)
            path.unlink(missing_ok=True)


HiddenStates = list[Tensor] | StoredStates
"""Micro-batches [samples, tokens, features] on the CPU, in memory or on disk."""


def stored_files(directory: Path, names: Sequence[str], turn: int) -> list[Path]:
    """The files that hold the states of these names in a turn."""
    return [directory / f"{name}-{turn}.states" for name in names]


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).flatten().numpy()
    return memoryview(array)
