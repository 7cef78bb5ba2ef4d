"""The tensors of a model, made of those in its files as transformers makes them.

    in the files                                                   in the model
    language_model.model.layers.0.mlp.up_proj.weight          ──►  model.language_model.layers.0.mlp.up_proj.weight
    layers.0.mlp.experts.{0, 1, …}.{gate, up}_proj.weight     ──►  layers.0.mlp.experts.gate_up_proj [experts, 2 i, h]

The table of names and operations is transformers' own (`get_model_conversion_mapping`). A tensor is made when it is
read, so that one block is in memory at a time. In this file a `stored` name is one in the files.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError, first_line
from llmq.models.conv1d import stored_transposed
from llmq.models.safetensors_files import TensorFiles


@dataclass
class _Conversion:
    """Tensors of the model that are made together, of one or more stored tensors."""

    name: str  # of the first tensor, with which transformers begins the names of the others
    converter: Any  # transformers' WeightConverter
    targets: list[str] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)  # name in the files -> the converter's pattern that it fits

    def run(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Return the model's tensors by name. `tensors`: the stored ones by name."""
        converter = deepcopy(self.converter)
        for stored, pattern in self.stored.items():
            converter.add_tensor(self.name, stored, pattern, tensors[stored])
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class RenamedFiles:
    """Tensor files, read under the names of a model.

    A stored tensor without a place in the model has the name that transformers would look for.

    Args:
        files: the files.
        model: a model on any device, such as the skeleton.
        packed: stored names of linears whose weights are packed, and the suffixes of their tensors.
        renamed: False if the files use the model's names already.

    Raises CheckpointError if two stored tensors claim the same place.
    """

    def __init__(
        self,
        files: TensorFiles,
        model: Any,
        packed: tuple[Iterable[str], tuple[str, ...]] = ((), ()),
        renamed: bool = True,
    ) -> None:
        self.stored, self._model, self._state = files, model, self._places(model)
        self._transposed = stored_transposed(model)
        # Imported here: `llmq.inspect` needs this file, and not transformers, which takes a second.
        from transformers import conversion_mapping, core_model_loading

        self._rename_key = core_model_loading.rename_source_key
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, core_model_loading.WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)]
        self._table = renamings, converters
        self._renamings, self._converters = self._table if renamed else ([], [])
        self._renamed_from: dict[str, str] = {}  # of tensors that are only renamed, by their name in the model
        self._conversions: dict[str, _Conversion] = {}  # of the other tensors
        names, suffixes = files.names(), packed[1]
        self.linears: dict[str, str] = {}
        """The stored names of packed linears, by their name in the model."""
        for stored in packed[0]:
            linear = self._linear_in_model(stored)
            self._refuse_two(linear, self.linears.get(linear), stored)
            self.linears[linear] = stored
        for linear, stored in self.linears.items():
            for suffix in (*suffixes, "bias"):  # AutoGPTQ writes zeros for linears without a bias
                if f"{stored}.{suffix}" in names:
                    self._rename(f"{stored}.{suffix}", f"{linear}.{suffix}")
        placed = set(self._renamed_from.values())
        for stored in sorted(names - placed, key=core_model_loading.dot_natural_key):
            self._place(stored)
        for made in self._conversions.keys() & self._renamed_from.keys():
            self._refuse_two(made, self._renamed_from[made], next(iter(self._conversions[made].stored)))
        made_of_others = (name for each in self._conversions.values() for name in each.targets)
        self._names = {*self._renamed_from, *made_of_others}

    def _places(self, model: Any) -> dict[str, Any]:
        """Return what transformers looks names up in: the tensors of its model."""
        return model.state_dict()

    def _linear_in_model(self, stored: str) -> str:
        name, pattern = self._renamed(f"{stored}.weight")
        return stored if pattern is not None else name.removesuffix(".weight")

    def _renamed(self, stored: str, state: dict[str, Any] | None = None) -> tuple[str, str | None]:
        """Return the name in the model, and the pattern of a converter if one has a part in it."""
        places, prefix = self._state if state is None else state, self._model.base_model_prefix
        name, pattern = self._rename_key(stored, self._renamings, self._converters, prefix, places)
        if name not in places and stored in places:
            return self._rename_key(stored, [], [], prefix, places)
        return name, pattern

    def _place(self, stored: str) -> None:
        name, pattern = self._renamed(stored)
        if pattern is None:
            self._rename(stored, name)
            return
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        first = converter.target_patterns[0]
        targets = [name.replace(first, target) for target in converter.target_patterns]
        targets = [target for target in targets if target in self._state]
        if not targets:
            self._rename(stored, name if name not in self._renamed_from else stored)
            return
        conversion = self._conversions.setdefault(name, _Conversion(name, converter, targets))
        conversion.stored[stored] = pattern
        self._conversions |= dict.fromkeys(targets, conversion)

    def _rename(self, stored: str, name: str) -> None:
        place = name
        if name not in self._state and name.rpartition(".")[0] not in self.linears:
            place = self._within_base(name)
            place = place if place not in self._renamed_from else self._within_base(stored)
        self._refuse_two(place, self._renamed_from.get(place), stored)
        self._renamed_from[place] = stored

    def _within_base(self, name: str) -> str:
        """Return a name with the prefix of the base model if it only makes sense there.

        transformers adds the prefix to what has a place. `h.9.attn.bias` of GPT-2 has none, but is no unknown tensor.
        """
        prefix, first = self._model.base_model_prefix, name.partition(".")[0]
        inside = dict(getattr(self._model, prefix, self._model).named_children())
        return f"{prefix}.{name}" if first in inside and not hasattr(self._model, first) else name

    @staticmethod
    def _refuse_two(name: str, one: str | None, other: str) -> None:
        """Raise CheckpointError if there is `one` already."""
        if one is not None:
            raise CheckpointError(f"{one} and {other} are both stored for {name}; remove one of them")

    @property
    def paths(self) -> list[Path]:
        return self.stored.paths

    def names(self) -> set[str]:
        return self._names

    def stored_names(self, name: str) -> list[str]:
        """Return the stored names of what a tensor is made of."""
        conversion = self._conversions.get(name)
        return [self._renamed_from[name]] if conversion is None else list(conversion.stored)

    def is_renamed(self, name: str) -> bool:
        """Return whether a tensor is one of the stored ones, and was not made by an operation."""
        return name in self._renamed_from

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor as it lies in the files, given how the model has it; or the other way round."""
        return tensor.T.contiguous() if name in self._transposed else tensor

    def made_with(self, name: str) -> list[str]:
        """Return the names of all tensors that are made of the same stored ones."""
        conversion = self._conversions.get(name)
        return [name] if conversion is None else conversion.targets

    def stored_linear(self, linear: str) -> str:
        """Return the stored name of a linear of the model: where its packed tensors belong.

        It is the model's own name if the weight is made by an operation, or if transformers would not find a packed
        tensor again under the stored one.
        """
        if linear in self.linears:
            return self.linears[linear]
        stored = self._renamed_from.get(f"{linear}.weight", "")
        packed, wanted = f"{stored.removesuffix('.weight')}.weight_packed", f"{linear}.weight_packed"
        is_found = stored.endswith(".weight") and self._renamed(packed, {wanted: True}) == (wanted, None)
        return stored.removesuffix(".weight") if is_found else linear

    def stored_module(self, module: str) -> str:
        """Return the stored name of a module, from that of its weight; its own name if the weight is made of others."""
        return self._renamed_from.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    def before_saving(self, stored: str) -> str:
        """Return the name that transformers turns into a stored one when it saves a model."""
        return self._rename_key(stored, self._renamings, [])[0]

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self.stored_names(name)[0])

    def nbytes(self, name: str) -> int:
        stored = sum(map(self.stored.nbytes, self.stored_names(name)))
        return stored // len(self.made_with(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, from the headers alone."""
        files: Any = self.stored
        if name in self._renamed_from:
            shape = files.shape(self._renamed_from[name])
            return shape[::-1] if name in self._transposed else shape
        return tuple(self._convert(name, lambda stored: torch.empty(files.shape(stored), device="meta")).shape)

    def is_float(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers that need no scale from elsewhere."""
        files: Any = self.stored
        return all(map(files.is_float, self.stored_names(name)))

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU in its stored dtype. Raises CheckpointError if it cannot be read or made."""
        if name in self._conversions:
            return self._convert(name, self.stored.read)
        return self.turned(name, self.stored.read(self._renamed_from.get(name, name)))

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors of packed linears as `read` does. A file is opened once."""
        files: Any = self.stored
        stored = {self._renamed_from.get(name, name): name for name in names}
        return {stored[key]: tensor for key, tensor in files.read_all(list(stored)).items()}

    def _convert(self, name: str, read: Any) -> Tensor:
        conversion = self._conversions[name]
        try:
            made = conversion.run({stored: read(stored) for stored in conversion.stored}, self._model)
            tensor = made[name]
        except CheckpointError:
            raise
        except Exception as error:  # stored tensors whose shapes do not go together
            few = ", ".join([*conversion.stored][:2])
            what = f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(f"{name} cannot be made of {few}, … in {self.paths[0].parent} ({what})") from None
        return tensor.contiguous()
