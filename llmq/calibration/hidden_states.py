"""Hidden states of the calibration text: on the device, else in memory, else on disk.

On disk:

    file 0:  inputs of block k      ◄── read
    file 1:  inputs of block k+1    ◄── written; read for the next block

A micro-batch is read and written whole. Its old copy stays in the other file until the next block overwrites it, so a
run that is killed within block k still has all inputs of block k. Plain reads and writes are used, not a mapped file:
the pages of a mapping would count as memory of this program.
"""

import io
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils._pytree import tree_map

from llmq.core.errors import WorkError

BatchKey = int | tuple[int, bool]  # index of a micro-batch, and perhaps whether it runs in the original model


@dataclass(frozen=True)
class HiddenDir:
    """The directory of one process's hidden states."""

    directory: Path
    name: str  # first word of the file names. Every new run takes another one, so it never reads files of an old run.
    turn: int | None = None  # the file, 0 or 1, that holds an earlier process's states (see `complete`)

    def files(self, kind: str) -> list[Path]:
        """Return the paths of the two files of one kind of states (`quantized` or `original`)."""
        return [self.directory / f"{self.name}-{kind}-{turn}.states" for turn in (0, 1)]


@dataclass(frozen=True)
class States:
    """Size of what waits for the next block in this process, mostly hidden states, and where it waits."""

    nbytes: int
    directory: Path | None  # None if they wait in memory
    arguments: int = 0  # bytes of them that are no hidden states: arguments of blocks that depend on the tokens
    experts: int = 0  # bytes beside them: what enters the experts of a block waits in the same place for their turn
    resident: bool = False  # all but the arguments wait on the GPU


def new_hidden_dir(directory: Path, name: str) -> HiddenDir:
    """Make a directory without any hidden states in it. Raises WorkError if that fails."""
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.states"):
            path.unlink()
    return HiddenDir(directory, name)


def remove_states(directory: Path | None) -> None:
    """Remove the hidden states of all processes of this run on this machine. None: the states are in memory."""
    if directory is not None:  # it is that of one process; the others differ only in the number at the end
        for path in directory.parent.glob(f"{directory.name.rpartition('-')[0]}-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


class StoredStates:
    """A list of tensors of one dtype on disk. Items are written and read by index.

    The two files are made if they do not exist. Raises WorkError if the disk is full, or if a file is too short.
    """

    def __init__(self, hidden_dir: HiddenDir, kind: str, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        self.hidden_dir, self._shapes, self._dtype = hidden_dir, list(shapes), dtype
        self._offsets = [0, *accumulate(shape.numel() * dtype.itemsize for shape in self._shapes)]
        with _disk_errors(hidden_dir.directory):
            self._files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in hidden_dir.files(kind)]
        self._turns = [hidden_dir.turn or 0] * len(self._shapes)  # for each item, which file holds its newest copy

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> Tensor:
        # The shape raises IndexError behind the last item, which ends a `for` loop.
        tensor = torch.empty(self._shapes[i], dtype=self._dtype)
        view, file, at = _bytes(tensor), self._files[self._turns[i]], self._offsets[i]
        with _disk_errors(self.hidden_dir.directory):
            while view:
                count = os.preadv(file, [view], at)
                if count == 0:
                    raise OSError("a file is shorter than it was written")
                view, at = view[count:], at + count
        return tensor

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        assert tensor.shape == self._shapes[i], (tensor.shape, self._shapes[i])
        turn, view, at = 1 - self._turns[i], _bytes(tensor.to("cpu", self._dtype).contiguous()), self._offsets[i]
        with _disk_errors(self.hidden_dir.directory):
            while view:
                count = os.pwrite(self._files[turn], view, at)
                view, at = view[count:], at + count
        self._turns[i] = turn

    @property
    def complete(self) -> int | None:
        """Return the file that holds the newest copies of all items; None if they are spread over both files."""
        return self._turns[0] if len(set(self._turns)) == 1 else None

    def close(self) -> None:
        """Close the files, without removing them. A second call does nothing."""
        while self._files:
            os.close(self._files.pop())


class PinnedStates:
    """A list of tensors in memory whose items come to a GPU and go back beside its work, on a stream of their own.

    While one item is being used, the next one is on its way. The memory is pinned: other memory is copied twice, and
    the program waits for that.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        self._items = [_pinned(shape, dtype=dtype) for shape in shapes]
        self._device, self._side = device, torch.cuda.Stream(device)
        self._coming: dict[int, tuple[Tensor, Any]] = {}  # what is on its way, and the event of its arrival

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Tensor:
        work = torch.cuda.current_stream(self._device)
        tensor, arrived = self._coming.pop(i, None) or self._fetch(i)
        work.wait_event(arrived)
        tensor.record_stream(work)  # nothing else gets its memory before the work that is queued now is done
        if i + 1 < len(self._items):
            self._coming = {i + 1: self._coming.get(i + 1) or self._fetch(i + 1)}
        return tensor

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        self._coming.pop(i, None)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._items[i].copy_(tensor, non_blocking=True)
        tensor.record_stream(self._side)

    def _fetch(self, i: int) -> tuple[Tensor, Any]:
        """Start a copy to the device. It comes after all earlier copies from there, so it reads the newest state."""
        with torch.cuda.stream(self._side):
            tensor = self._items[i].to(self._device, non_blocking=True)
            return tensor, torch.cuda.current_stream(self._device).record_event()


def _pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


# Micro-batches [samples, tokens, features]. A list holds them on the device of the computation.
HiddenStates = list[Tensor] | PinnedStates | StoredStates


class StoredRows:
    """A matrix in a file of its own, of which single rows are read: `stored[rows]`, like a tensor's.

    A file of the same `kind` is replaced. Raises WorkError if the disk is full, or if the file is too short.
    """

    def __init__(self, hidden_dir: HiddenDir, kind: str, matrix: Float[Tensor, "rows width"]) -> None:
        self._path, self._dtype, self._width = (
            hidden_dir.directory / f"{hidden_dir.name}-{kind}.states",
            matrix.dtype,
            matrix.shape[1],
        )
        with _disk_errors(self._path.parent):
            self._path.write_bytes(_bytes(matrix.cpu().contiguous()))

    def __getitem__(self, rows: Int64[Tensor, "n"]) -> Float[Tensor, "n width"]:
        found = torch.empty(len(rows), self._width, dtype=self._dtype)
        with _disk_errors(self._path.parent), self._path.open("rb", buffering=0) as file:
            for row, into in zip(rows.tolist(), found, strict=True):
                if os.preadv(file.fileno(), [view := _bytes(into)], row * len(view)) < len(view):
                    raise OSError("a file is shorter than it was written")
        return found


class BatchValues:
    """Tensors, or trees of them, that belong to a micro-batch: on the CPU in memory, or each in a file of its own."""

    def __init__(self, hidden_dir: HiddenDir | None, kind: str) -> None:
        self._hidden_dir, self._kind = hidden_dir, kind
        self._values: dict[BatchKey, Any] = {}  # in memory the value, else the path of its file

    def __getitem__(self, key: BatchKey) -> Any:
        value = self._values[key]
        if self._hidden_dir is None:
            return value
        with _disk_errors(self._hidden_dir.directory):
            return torch.load(io.BytesIO(value.read_bytes()), weights_only=True)

    def __setitem__(self, key: BatchKey, value: Any) -> None:
        # A copy: a view would keep all of the tensor that it is a part of.
        value = tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, value)
        if self._hidden_dir is not None:
            written = io.BytesIO()
            torch.save(value, written)
            number = "-".join(map(str, key if isinstance(key, tuple) else (key,)))
            value = self._hidden_dir.directory / f"{self._hidden_dir.name}-{self._kind}-{number}.states"
            with _disk_errors(self._hidden_dir.directory):
                value.write_bytes(written.getbuffer())
        self._values[key] = value

    def get(self, key: BatchKey, default: Any) -> Any:
        """Return the value of a key, or `default` if it has none."""
        return self[key] if key in self._values else default


@contextmanager
def _disk_errors(directory: Path) -> Generator[None]:
    """Turn an OSError into a WorkError that names the directory and the flag to change."""
    try:
        yield
    except OSError as error:
        raise WorkError(f"hidden states cannot be kept in {directory}: {error}; name another --offload-dir") from None


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.view(torch.uint8).flatten().numpy()))
