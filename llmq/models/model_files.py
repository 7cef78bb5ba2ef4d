"""The tensors of a model whose experts are linears (`experts.py`), read from files that may hold them in other ways.

    in the files                                    as transformers has it           in the model
    experts.3.w1.weight [i, h]                 ──►  part of experts.gate_up_proj ──► experts.3.gate_proj.weight
    experts.gate_up_proj [E, 2 i, h]           ──►  experts.gate_up_proj         ──► experts.3.gate_proj.weight, …

What transformers would merge from the linears of single experts is read one linear at a time.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.models.experts import Layout, Place, layouts
from llmq.models.renamed_files import RenamedFiles
from llmq.models.safetensors_files import TensorFiles

_MERGING = {"MergeModulelist", "Concatenate"}  # transformers' operations that only put linears side by side


@dataclass(frozen=True)
class _Part:
    """A weight or bias of one expert."""

    module: str  # the name of the experts in the model
    layout: Layout
    expert: int
    place: Place

    @property
    def whole(self) -> str:
        """The name of the tensor that holds it in transformers' model."""
        return f"{self.module}.{self.place.parameter}"

    def of(self, whole: Tensor) -> Tensor:
        return self.place.of(whole, self.expert, self.layout.experts)


class ModelFiles(RenamedFiles):
    """Tensor files, read under the names of a model; see `RenamedFiles`."""

    def __init__(
        self,
        files: TensorFiles,
        model: Any,
        packed: tuple[Iterable[str], tuple[str, ...]] = ((), ()),
        renamed: bool = True,
    ) -> None:
        self._layouts = layouts(model)
        self._parts = {
            f"{module}.{expert}.{inner}": _Part(module, layout, expert, place)
            for module, layout in self._layouts.items()
            for expert in range(layout.experts)
            for inner, place in layout.places.items()
        }
        self._last: tuple[str, Tensor] | None = None  # the tensor of all experts that was read last
        super().__init__(files, model, packed, renamed)
        self._single = self._single_linears()
        names = super().names()
        wholes = {part.whole for part in self._parts.values()}
        self._all_names = names - wholes | {name for name, part in self._parts.items() if part.whole in names}

    def _places(self, model: Any) -> dict[str, Any]:
        wholes = dict.fromkeys(part.whole for part in self._parts.values())
        return {name: each for name, each in model.state_dict().items() if name not in self._parts} | wholes

    def _single_linears(self) -> dict[str, str]:
        """Return the stored name of each weight of an expert that the files hold for itself."""
        single: dict[str, str] = {}
        for module, layout in self._layouts.items():
            for inner, place in layout.places.items():
                conversion = self._conversions.get(f"{module}.{place.parameter}")
                if conversion is None or place.turned:
                    continue
                operations = {type(operation).__name__ for operation in conversion.converter.operations}
                together, patterns = layout.sharing(place), conversion.converter.source_patterns
                if operations <= _MERGING and len(together) == len(patterns):
                    pattern = patterns[together.index(inner)]
                    stored = [name for name, fitting in conversion.stored.items() if fitting == pattern]
                    if len(stored) == layout.experts:
                        single |= {f"{module}.{expert}.{inner}": name for expert, name in enumerate(stored)}
        return single

    def _linear_in_model(self, stored: str) -> str:
        name, pattern = self._renamed(f"{stored}.weight")
        module, _, parameter = name.rpartition(".")
        if pattern is None or module not in self._layouts:
            return super()._linear_in_model(stored)
        layout = self._layouts[module]
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        together = [inner for inner, place in layout.places.items() if place.parameter == parameter]
        number = re.search(r"\.([0-9]+)\.[^.]+$", stored)
        if number is None or len(together) != len(converter.source_patterns) or not self._only_merges(pattern):
            return stored
        return f"{module}.{number[1]}.{together[converter.source_patterns.index(pattern)]}".removesuffix(".weight")

    def _only_merges(self, pattern: str | None) -> bool:
        """Return whether there is a converter with this pattern, and it only puts linears side by side."""
        found = (each for each in self._table[1] if pattern in each.source_patterns)
        return any({type(operation).__name__ for operation in each.operations} <= _MERGING for each in found)

    def names(self) -> set[str]:
        return self._all_names

    def stored_names(self, name: str) -> list[str]:
        if name in self._single:
            return [self._single[name]]
        return super().stored_names(self._whole(name))

    def _whole(self, name: str) -> str:
        """Return the name of the tensor of all experts that a tensor is a part of; its own if it is none."""
        is_apart = name not in self._parts or name in self._renamed_from
        return name if is_apart else self._parts[name].whole

    def is_renamed(self, name: str) -> bool:
        return name in self._single or super().is_renamed(name)

    def made_with(self, name: str) -> list[str]:
        if name in self._single:
            return [name]
        wholes = super().made_with(self._whole(name))
        if self._whole(name) == name:
            return wholes
        return [part for whole in wholes for part in self._parts_of[whole]]

    @cached_property
    def _parts_of(self) -> dict[str, list[str]]:
        """The names of the parts of each tensor of all experts."""
        parts: dict[str, list[str]] = defaultdict(list)
        for name, part in self._parts.items():
            parts[part.whole].append(name)
        return parts

    def stored_linear(self, linear: str) -> str:
        name = f"{linear}.weight"
        if linear in self.linears or name not in self._parts:
            return super().stored_linear(linear)
        if name in self._single:
            return self._single[name].removesuffix(".weight")
        part = self._parts[name]
        stored = self._renamed_from.get(part.whole, "").removesuffix(f".{part.place.parameter}")
        beside = f"{stored}{linear.removeprefix(part.module)}"
        return beside if stored and self._linear_in_model(beside) == linear else linear

    def stored_module(self, module: str) -> str:
        return self.stored_linear(module) if f"{module}.weight" in self._parts else super().stored_module(module)

    def is_merged(self, linear: str) -> bool:
        """Return whether transformers makes a tensor of all experts out of this linear, under its name in the files."""
        stored, prefix = f"{self.stored_linear(linear)}.weight", self._model.base_model_prefix
        name, pattern = self._rename_key(stored, *self._table, prefix, self._state)
        return name == self._parts[f"{linear}.weight"].whole and self._only_merges(pattern)

    def shape(self, name: str) -> tuple[int, ...]:
        files: Any = self.stored
        if name in self._single:
            return files.shape(self._single[name])
        if self._whole(name) == name:
            return super().shape(name)
        part = self._parts[name]
        self._check_whole(part, super().shape(part.whole))
        return tuple(part.of(torch.empty(super().shape(part.whole), device="meta")).shape)

    def read(self, name: str) -> Tensor:
        if name in self._single:
            return self.stored.read(self._single[name])
        if (whole := self._whole(name)) == name:
            return super().read(name)
        if self._last is None or self._last[0] != whole:
            self._last = None
            self._last = whole, super().read(whole)
            self._check_whole(self._parts[name], tuple(self._last[1].shape))
        return self._parts[name].of(self._last[1]).contiguous()

    def _check_whole(self, part: _Part, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor of all experts has the shape that transformers wants."""
        wanted = part.layout.wholes[part.place.parameter]
        if shape != wanted:
            raise CheckpointError(f"{self.paths[0].parent}: {part.whole} is {shape}, the model wants {wanted}")

    def forget(self) -> None:
        """Free the tensor of all experts that was read last."""
        self._last = None


def by_conversion(files: ModelFiles, names: Iterable[str]) -> list[list[str]]:
    """Return the names in lists: those of tensors that are made of the same stored ones are together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[files.stored_names(name)[0]].append(name)
    return list(groups.values())
