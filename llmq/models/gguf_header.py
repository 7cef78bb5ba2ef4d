"""What a .gguf file says of itself: its metadata and the names, types and places of its tensors, checked.

The file may come from strangers. The package gguf believes every length that it reads: of a damaged file it would make
lists without end. So the lengths are compared with the size of the file before that package opens it. The layout is
that of versions 2 and 3 of the format (docs/gguf.md of ggml).
"""

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmq.core.errors import CheckpointError

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS, _ALIGNMENT = 4, 32
_TENSORS, _KEYS, _ITEMS = 1_000_000, 100_000, 1 << 21  # more than any model has; items of all arrays together


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file."""

    kind: int  # the number of its type
    shape: tuple[int, ...]  # as the file has it, with the length of a row first
    start: int  # where its bytes begin


@dataclass(frozen=True)
class GgufHeader:
    """Metadata: numbers, flags and texts by key (of arrays, their length); and the tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Return what a .gguf file says of itself. Raises CheckpointError if it is damaged or no such file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Cursor(content).header()
    except (OSError, ValueError, struct.error) as error:  # mmap refuses an empty file with ValueError
        raise CheckpointError(f"{path} is no sound .gguf file ({error}); fetch it again") from None
    _refuse_absurd(path, header)
    return header


class _Cursor:
    """Reads a file from its beginning. Raises ValueError for what goes beyond its end."""

    def __init__(self, content: Any) -> None:
        self._content, self._at, self._items = content, 0, 0

    def header(self) -> GgufHeader:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        if (version := self._number("<I")) not in (2, 3):
            raise ValueError(f"version {version} of the format; llmq reads 2 and 3")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _TENSORS or keys > _KEYS:
            raise ValueError(f"it promises {tensors} tensors and {keys} keys")
        metadata = dict[str, Any]()
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                raise ValueError(f"{key[:80]!r} is there twice")
            metadata[key] = self._value(self._number("<I"))
        found = dict[str, StoredTensor]()
        for _ in range(tensors):
            name = self._text()
            if name in found:
                raise ValueError(f"tensor {name[:80]!r} is there twice")
            found[name] = self._tensor()
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= len(self._content):
            raise ValueError(f"an alignment of {str(alignment)[:80]}")
        start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, {n: replace(each, start=start + each.start) for n, each in found.items()})

    def _tensor(self) -> StoredTensor:
        """Return what is said of a tensor. Its start is counted from where all data begin."""
        count = self._number("<I")
        if not 0 < count <= _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {count} dimensions")
        shape = tuple(self._number("<Q") for _ in range(count))
        kind, offset = self._number("<I"), self._number("<Q")
        # Fewer than one bit for each weight is no type.
        if math.prod(shape) > 8 * len(self._content) or 0 in shape or offset > len(self._content):
            raise ValueError(f"a tensor of {shape} at {offset}, which do not fit into it")
        return StoredTensor(kind, shape, offset)

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > _ITEMS:  # the package gguf makes several objects of each
            raise ValueError(f"an array of {count} values")
        if kind in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            self._skip_texts(count)
        else:
            raise ValueError(f"an array of values of type {kind}")
        return count

    def _number(self, layout: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._content, start)[0]

    def _text(self) -> str:
        length = self._number("<Q")
        start = self._at
        self._skip(length)
        return self._content[start : self._at].decode("utf-8")

    def _skip_texts(self, count: int) -> None:
        """Go behind texts that follow each other. A loop of its own: a vocabulary has 100,000 and more."""
        length, content, at, end = struct.Struct("<Q"), self._content, self._at, len(self._content)
        for _ in range(count):
            if at > end - length.size:
                raise ValueError("it ends too early")
            at += length.size + length.unpack_from(content, at)[0]
        self._skip(at - self._at)

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise ValueError("it ends too early")
        self._at += count


def _refuse_absurd(path: Path, header: GgufHeader) -> None:
    """Raise CheckpointError if a count is larger than the tensors allow: transformers would build such a model."""
    longest = max((max(tensor.shape) for tensor in header.tensors.values()), default=0)
    for key, value in header.metadata.items():
        if isinstance(value, bool | str) or not key.endswith(("count", "length", "count_kv", "vocab_size")):
            continue
        most = {"block_count": len(header.tensors), "context_length": 1 << 27}.get(key.rpartition(".")[2], longest)
        if key.startswith(str(header.metadata.get("general.architecture"))) and not 0 <= value <= most:
            raise CheckpointError(f"{path}: {key} is {value}, more than its tensors allow ({most}); fetch it again")
