"""Where the rows of packed linears go in a GGUF file: asked of llama.cpp's converter, which is made for floats.

It converts the model twice with numbers in the place of weights: each weight is the number of its row, then that of its
column. What moves whole rows, and columns in whole blocks, can be done to blocks of codes as well:

    rows 0 1 2 3  ──► converter ──►  rows 0 2 1 3   so the blocks of row 2 are written second

Nothing is computed with weights here, and tensors are made one at a time.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llmq.core.errors import RequestError
from llmq.models.gguf_converter import Added, Converted, Leaf, layer_of, open_converter

_Seen = TypeVar("_Seen")
_COUNTED = 1 << 24  # float32 counts no further


@dataclass(frozen=True)
class Laid:
    """Which rows of which packed linears one tensor of the file holds."""

    linears: list[str]
    source: np.ndarray  # [rows] for each row of the tensor, its place in `linears`
    row: np.ndarray  # [rows] and its row there
    blocks: np.ndarray  # [in / block] for each block of a row, which block of the linear's row it is

    def placed(self, rows_of: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the blocks of the tensor, [rows, in / block, bytes]. `rows_of` gives those of one linear."""
        placed: np.ndarray | None = None
        for i, name in enumerate(self.linears):
            rows = rows_of(name)
            if placed is None:
                placed = np.empty((len(self.row), *rows.shape[1:]), rows.dtype)
            here = self.source == i
            placed[here] = rows[self.row[here]][:, self.blocks]
        assert placed is not None
        return placed

    def taken(self, name: str, placed: np.ndarray) -> np.ndarray:
        """Return the blocks of one linear, given those of the tensor."""
        here = self.source == self.linears.index(name)
        rows = np.empty((int(here.sum()), *placed.shape[1:]), placed.dtype)
        rows[self.row[here][:, None], self.blocks] = placed[here]
        return rows


def lay_out(
    model: Converted,
    shapes: Mapping[str, tuple[int, int]],
    kinds: Mapping[str, tuple[str, int]],
    transposed: Collection[str] = (),
) -> tuple[dict[str, Laid], set[str]]:
    """Return the layout of each tensor that is made of packed linears; and the linears whose blocks cannot be moved.

    Args:
        shapes: of the packed linears, by their names in the files of the model.
        kinds: the type of the blocks of each, and the number of weights in a block.
        transposed: those that Hugging Face's files hold as [in, out].
    """
    first, ends = dict[str, int](), dict[int | None, int]()  # the number of each linear's first row in its layer
    for name, shape in shapes.items():
        first[name] = ends.get(layer_of(name), 0)
        ends[layer_of(name)] = first[name] + shape[0]
    if max(ends.values()) > _COUNTED:
        raise RequestError(f"a layer has more than {_COUNTED} packed rows; such models are not written as GGUF")
    rows, columns = dict[str, Leaf](), dict[str, Leaf]()
    for name, shape in shapes.items():
        rows[name] = _leaf(shape, partial(_row_numbers, shape, first[name]), name in transposed)
        columns[name] = _leaf(shape, partial(_column_numbers, shape), name in transposed)
    of_columns = {tensor: seen for tensor, _, seen in _moved(model, columns, _columns_seen)}
    laid, fixed = dict[str, Laid](), set[str]()
    for tensor, layer, (numbers, whole) in _moved(model, rows, _rows_seen):
        linears = [name for name in first if layer_of(name) == layer]
        starts = np.array([first[name] for name in linears])
        source = np.searchsorted(starts, numbers, "right") - 1
        inside = np.unique(source)
        names = [linears[i] for i in inside]
        blocks = _whole_blocks(of_columns[tensor], {kinds[name] for name in names}) if whole else None
        if blocks is None or len(np.unique(numbers)) != sum(shapes[name][0] for name in names):
            fixed |= set(names)
        else:
            laid[tensor] = Laid(names, np.searchsorted(inside, source), numbers - starts[source], blocks)
    while split := [tensor for tensor, each in laid.items() if not fixed.isdisjoint(each.linears)]:
        fixed |= {name for tensor in split for name in laid.pop(tensor).linears}
    return laid, fixed


def _moved(
    model: Converted, leaves: Mapping[str, Leaf], look: Callable[[np.ndarray], _Seen]
) -> list[tuple[str, int | None, _Seen]]:
    """Return name and layer of each tensor that the converter makes of these leaves, and what `look` sees of it."""
    seen = list[tuple[str, int | None, _Seen]]()

    def collect(_: Any, added: Added) -> None:
        if added.of is not None:
            numbers = type(added.data).to_eager(added.data)
            seen.append((added.name, added.layer, look(numbers.reshape(-1, numbers.shape[-1]))))

    open_converter(model, leaves, collect).prepare_tensors()
    return seen


def _leaf(shape: tuple[int, int], numbers: Callable[[], Tensor], transposed: bool) -> Leaf:
    if transposed:
        return Leaf((shape[1], shape[0]), torch.float32, lambda: numbers().T)
    return Leaf(shape, torch.float32, numbers)


def _row_numbers(shape: tuple[int, int], first: int) -> Tensor:
    return torch.arange(first, first + shape[0], dtype=torch.float32)[:, None].expand(shape).clone()


def _column_numbers(shape: tuple[int, int]) -> Tensor:
    return torch.arange(shape[1], dtype=torch.float32).expand(shape).clone()


def _rows_seen(numbers: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the number of each row, and True; if rows do not stay whole, all numbers there are, and False."""
    whole = bool((numbers == numbers[:, :1]).all())
    return (numbers[:, 0] if whole else np.unique(numbers)).astype(np.int64), whole


def _columns_seen(numbers: np.ndarray) -> np.ndarray | None:
    """Return the number of each column; None if rows differ."""
    return numbers[0].astype(np.int64) if bool((numbers == numbers[:1]).all()) else None


def _whole_blocks(columns: np.ndarray | None, kinds: set[tuple[str, int]]) -> np.ndarray | None:
    """Return which block of columns stands in each place; None if blocks do not stay whole."""
    if columns is None or len(kinds) != 1:
        return None
    ((_, size),) = kinds
    if len(columns) % size:
        return None
    blocks = columns.reshape(-1, size)
    places = blocks[:, 0] // size
    expected = places[:, None] * size + np.arange(size)
    return places if (blocks == expected).all() and len(np.unique(places)) == len(places) else None
