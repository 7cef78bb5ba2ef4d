"""Safetensors shards put together from parts on disk, in the memory of one buffer.

part 0: a b | part 1: c d | part 2: e        written as blocks finish
shard 1: a b c d          | shard 2: e       copied together when all are there, widest numbers first
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BUFFER = 1 << 24  # bytes


@dataclass(frozen=True)
class _Entry:
    """One tensor of a part."""

    name: str
    dtype: str
    shape: list[int]
    part: Path
    start: int
    """Byte in the part's file."""
    size: int


def sizes_in(path: Path) -> dict[str, int]:
    """Bytes of every tensor of a safetensors file, by name."""
    return {entry.name: entry.size for entry in _entries(path)}


def join(parts: Sequence[Path], path: Path) -> None:
    """Write the tensors of all parts, which are safetensors files of our own, into one."""
    # As safetensors does it, so that every tensor begins at a multiple of its numbers' width.
    entries = sorted((e for part in parts for e in _entries(part)), key=lambda e: (-_width(e), e.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    files: dict[Path, BinaryIO] = {}
    try:
        files = {part: part.open("rb") for part in parts}
        with path.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                _copy(files[entry.part], entry, target)
            target.flush()
            os.fsync(target.fileno())
    finally:
        for file in files.values():
            file.close()


def grouped(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of consecutive parts whose sizes sum up to at most `most` (or that are larger, alone)."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    return groups


def _entries(path: Path) -> list[_Entry]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Mapping[str, Any] = json.loads(file.read(length))
    entries: list[_Entry] = []
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = about["data_offsets"]
            entries.append(_Entry(name, about["dtype"], about["shape"], path, 8 + length + start, stop - start))
    return entries


def _width(entry: _Entry) -> int:
    """Bits of one number."""
    digits = re.search(r"\d+", entry.dtype)
    return int(digits[0]) if digits else 8


def _copy(source: BinaryIO, entry: _Entry, target: BinaryIO) -> None:
    source.seek(entry.start)
    left = entry.size
    while left:
        data = source.read(min(left, _BUFFER))
        if not data:
            raise OSError(f"{entry.part} is shorter than it was written")
        target.write(data)
        left -= len(data)
