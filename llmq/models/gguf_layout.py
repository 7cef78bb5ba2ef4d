"""Where the rows of packed linears go in a GGUF file: asked of llama.cpp's converter, which is made for floats.

It converts the model twice with numbers in the place of weights: each weight is the number of its row, then that of its
column. What moves whole rows, and columns in whole blocks, can be done to blocks of codes as well:

    rows 0 1 2 3  ──► converter ──►  rows 0 2 1 3   so the blocks of row 2 are written second

Nothing is computed with weights here, and tensors are made one at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llmq.core.errors import RequestError
from llmq.models.conv1d import stored_transposed
from llmq.models.experts import layouts
from llmq.models.gguf_converter import Added, Converted, Leaf, layer_of, open_converter

_Seen = TypeVar("_Seen")
_COUNTED = 1 << 24  # float32 counts no further


@dataclass(frozen=True)
class Source:
    """A tensor of Hugging Face's files that consists of the weights of packed linears: of one, or of all experts."""

    shape: tuple[int, ...]
    parts: list[tuple[str, Callable[[Tensor], Tensor]]]
    """Each linear, by its name in the checkpoint, and how its weight [out, in] is seen in the tensor."""

    def filled(self, weight_of: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor with these weights, float32."""
        whole = torch.empty(self.shape)
        for linear, seen in self.parts:
            seen(whole).copy_(weight_of(linear))
        return whole


def sources_of(model: Any, stored_linear: Mapping[str, str]) -> dict[str, Source]:
    """Return the tensors that Hugging Face's files would hold instead of packed linears, by name.

    `stored_linear`: for each packed linear of the model its name in the checkpoint, which is that in the files. But
    where the files hold all experts in one tensor, it is that in the model.

    Raises RequestError if some experts of such a tensor are packed, and others are not.
    """
    transposed, left, sources = stored_transposed(model), dict(stored_linear), dict[str, Source]()
    for module, layout in layouts(model).items():
        for parameter, shape in layout.wholes.items():
            whole = _in_files(model, f"{module}.{parameter}", shape)
            places = {
                inner.removesuffix(".weight"): p for inner, p in layout.places.items() if p.parameter == parameter
            }
            names = {f"{module}.{i}.{inner}": (i, p) for inner, p in places.items() for i in range(layout.experts)}
            if whole is None or left.keys().isdisjoint(names):
                continue
            if not left.keys() >= names.keys():
                raise RequestError(f"{module}: some experts are packed, and others are not; GGUF has one type for all")
            views = ((left.pop(n), partial(p.of, expert=i, experts=layout.experts)) for n, (i, p) in names.items())
            sources[whole] = Source(shape, [*views])
    for name, stored in left.items():
        linear = model.get_submodule(name)
        shape, seen = (linear.out_features, linear.in_features), _itself
        if f"{name}.weight" in transposed:
            shape, seen = shape[::-1], Tensor.t
        sources[f"{stored}.weight"] = Source(shape, [(stored, seen)])
    return sources


def _in_files(model: Any, name: str, shape: tuple[int, ...]) -> str | None:
    """Return the name that a tensor of all experts has in the files; None if they hold each expert for itself."""
    from transformers.core_model_loading import revert_weight_conversion

    names = [*revert_weight_conversion(model, {name: torch.empty(shape, device="meta")})]
    return names[0] if len(names) == 1 else None


def _itself(whole: Tensor) -> Tensor:
    return whole


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

    def taken(self, name: str, placed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows of a linear the tensor holds, and their blocks, given those of the tensor."""
        here = self.source == self.linears.index(name)
        rows = np.empty_like(placed[here])
        rows[:, self.blocks] = placed[here]
        return self.row[here], rows


def lay_out(
    model: Converted, sources: Mapping[str, Source], kinds: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, Laid], set[str]]:
    """Return the layout of each tensor that is made of packed linears; and the linears whose blocks cannot be moved.

    `kinds`: for each packed linear the type of its blocks, and the number of weights in one.
    """
    first, ends = dict[str, int](), dict[int | None, int]()  # the number of each linear's first row in its layer
    shapes, layers = dict[str, tuple[int, int]](), dict[str, int | None]()
    for name, source in sources.items():
        whole = torch.empty(source.shape, device="meta")
        for linear, seen in source.parts:
            rows, columns = seen(whole).shape
            shapes[linear], layers[linear] = (rows, columns), layer_of(name)
            first[linear] = ends.get(layer_of(name), 0)
            ends[layer_of(name)] = first[linear] + rows
    if max(ends.values()) > _COUNTED:
        raise RequestError(f"a layer has more than {_COUNTED} packed rows; such models are not written as GGUF")

    def row_numbers(linear: str) -> Tensor:
        return torch.arange(first[linear], first[linear] + shapes[linear][0], dtype=torch.float32)[:, None]

    def column_numbers(linear: str) -> Tensor:
        return torch.arange(shapes[linear][1], dtype=torch.float32)

    of_columns = {tensor: seen for tensor, _, seen in _moved(model, sources, column_numbers, _columns_seen)}
    laid, fixed, rows_seen = dict[str, Laid](), set[str](), defaultdict[str, list[np.ndarray]](list)
    for tensor, layer, (numbers, whole) in _moved(model, sources, row_numbers, _rows_seen):
        linears = [name for name in first if layers[name] == layer]
        starts = np.array([first[name] for name in linears])
        source = np.searchsorted(starts, numbers, "right") - 1
        inside = np.unique(source)
        names = [linears[i] for i in inside]
        blocks = _whole_blocks(of_columns[tensor], {kinds[name] for name in names}) if whole else None
        if blocks is None:
            fixed |= set(names)
            continue
        laid[tensor] = each = Laid(names, np.searchsorted(inside, source), numbers - starts[source], blocks)
        for i, name in enumerate(names):
            rows_seen[name].append(each.row[each.source == i])
    fixed |= {n for n, seen in rows_seen.items() if sorted(np.concatenate(seen).tolist()) != [*range(shapes[n][0])]}
    # A tensor of the files is written in one way: what shares one with a linear that is fixed, is fixed as well.
    together = [{name for name, _ in source.parts} for source in sources.values()] + [
        {*each.linears} for each in laid.values()
    ]
    while split := [names for names in together if not fixed.isdisjoint(names) and not names <= fixed]:
        fixed = fixed.union(*split)
    return {tensor: each for tensor, each in laid.items() if fixed.isdisjoint(each.linears)}, fixed


def _moved(
    model: Converted,
    sources: Mapping[str, Source],
    numbers: Callable[[str], Tensor],
    look: Callable[[np.ndarray], _Seen],
) -> list[tuple[str, int | None, _Seen]]:
    """Return name and layer of each tensor that the converter makes of these numbers, and what `look` sees of it."""
    seen = list[tuple[str, int | None, _Seen]]()

    def collect(_: Any, added: Added) -> None:
        if added.of is not None:
            moved = type(added.data).to_eager(added.data)
            seen.append((added.name, added.layer, look(moved.reshape(-1, moved.shape[-1]))))

    leaves = {name: Leaf(each.shape, torch.float32, partial(each.filled, numbers)) for name, each in sources.items()}
    open_converter(model, leaves, collect).prepare_tensors()
    return seen


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
