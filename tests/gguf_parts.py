"""A .gguf file taken apart and put together, without llmq or the package gguf."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Taken:
    """A file taken apart."""

    version: int
    keys: list[tuple[bytes, int, bytes]]  # name, type, value
    tensors: list[tuple[bytes, list[int], int, int]]  # name, shape, type, place
    data: bytes
    counts: list[int]  # how many of each it promises; the true ones are added to these

    @classmethod
    def of(cls, content: bytes) -> Taken:
        version, tensors, keys = struct.unpack_from("<IQQ", content, 4)
        at = 24

        def text() -> bytes:
            nonlocal at
            (length,) = struct.unpack_from("<Q", content, at)
            at += 8 + length
            return content[at - length : at]

        def number(layout: str) -> Any:
            nonlocal at
            at += struct.calcsize(layout)
            return struct.unpack_from(layout, content, at - struct.calcsize(layout))[0]

        def value(kind: int) -> None:
            if kind == STRING:
                text()
            elif kind == ARRAY:
                inner, count = number("<I"), number("<Q")
                for _ in range(count):
                    value(inner)
            else:
                number(FORMATS[kind])

        found_keys, found = [], []
        for _ in range(keys):
            name, kind = text(), number("<I")
            start = at
            value(kind)
            found_keys.append((name, kind, content[start:at]))
        for _ in range(tensors):
            name = text()
            shape = [number("<Q") for _ in range(number("<I"))]
            found.append((name, shape, number("<I"), number("<Q")))
        return cls(version, found_keys, found, content[-(-at // ALIGNMENT) * ALIGNMENT :], [0, 0])

    def whole(self) -> bytes:
        counts = len(self.tensors) + self.counts[0], len(self.keys) + self.counts[1]
        out = b"GGUF" + struct.pack("<IQQ", self.version, *(count % (1 << 64) for count in counts))
        for name, kind, value in self.keys:
            out += text_of(name) + struct.pack("<I", kind) + value
        for name, shape, kind, place in self.tensors:
            out += text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)
        return out + bytes(-len(out) % ALIGNMENT) + self.data


def text_of(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
