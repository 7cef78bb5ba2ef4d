"""The reader of the package gguf, but quick at a vocabulary.

That package makes several arrays of numpy for the length and the bytes of each word. Here a word is one slice.
"""

import struct
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_reader import GGUFReader  # gguf.GGUFReader is something else inside `parsed_once`

_ARRAY, _TEXT = GGUFValueType.ARRAY, GGUFValueType.STRING
_COUNTS = struct.Struct("<IQ")  # what an array begins with: the type of its values, and how many they are
_LENGTH = struct.Struct("<Q")  # what a text begins with


class QuickReader(GGUFReader):
    """Finds what GGUFReader finds in a file that `read_header` let pass: such a file is little-endian and whole."""

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """Return the size of a value, its parts, the indices of those that hold the content, and its types.

        The parts of an array are its values alone. Nobody looks at the lengths of its texts.
        """
        if raw_type != _ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = _COUNTS.unpack_from(self.data.data, orig_offs)
        start = orig_offs + _COUNTS.size
        if kind == _TEXT:
            parts, end = self._texts(start, count)
        elif (number := self.gguf_scalar_to_np.get(kind)) is not None:
            numbers = np.frombuffer(self.data, np.dtype(number).newbyteorder("<"), count, start)
            parts, end = [numbers[i : i + 1] for i in range(count)], start + numbers.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [_ARRAY, GGUFValueType(kind)] if count else [_ARRAY]
        return end - orig_offs, parts, list(range(count)), types

    def _texts(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
        """Return the bytes of texts that lie one behind the other, and where they end."""
        # A slice of a memmap is slow to make, and the garbage collector walks slices of a memoryview again and again.
        lengths, content, texts = self.data.data, self.data.view(np.ndarray), list[np.ndarray]()
        for _ in range(count):
            start += _LENGTH.size
            end = start + _LENGTH.unpack_from(lengths, start - _LENGTH.size)[0]
            texts.append(content[start:end])
            start = end
        return texts, start
