"""How the weights of one linear are stored, whatever the format; and what every format checks alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import BITS


@dataclass(frozen=True)
class Scheme:
    """What a reader must know of a linear beside its tensors."""

    bits: int
    group_size: int
    """Inputs per group; -1 for one group per row."""
    symmetric: bool
    act_order: bool = False
    """Inputs of a group are spread over the row (GPTQ's desc_act)."""
    zero_offset: int = 0
    """What the file's zero points lack: GPTQ v1 stores zero - 1."""

    @classmethod
    def of(cls, bits: Any, group_size: Any, symmetric: Any, act_order: Any = False, zero_offset: int = 0) -> Scheme:
        """The scheme that a config of strangers describes. Raises CheckpointError for values no format can mean."""
        if not _is_int(bits) or bits not in BITS:
            raise CheckpointError(f"{_shown(bits)} bits per weight; llmq reads {', '.join(map(str, BITS))}")
        if not _is_int(group_size) or (group_size < 1 and group_size != -1):
            raise CheckpointError(f"group size {_shown(group_size)}; it must be positive, or -1 for whole rows")
        for what, value in (("symmetric", symmetric), ("act order", act_order)):
            if not isinstance(value, bool):
                raise CheckpointError(f"{what} must be true or false; found {_shown(value)}")
        return cls(bits, group_size, symmetric, act_order, zero_offset)

    def changed(self, fields: Mapping[str, Any]) -> Scheme:
        """The scheme with other values in these fields. Raises CheckpointError like `of`."""
        return Scheme.of(**(vars(self) | dict(fields)))

    def groups(self, columns: int) -> int:
        """Groups in a row of that many inputs; the last may be short."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)


Schemes = Mapping[str, Scheme]
"""The scheme of each packed linear, by its name in the model."""


def part_of(name: str, tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """A tensor of a linear. Raises CheckpointError if it is not there."""
    try:
        return tensors[f"{name}.{part}"]
    except KeyError:
        raise CheckpointError(f"{name}: {name}.{part} is missing") from None


def expect_words(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor is packed words of that shape."""
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected int32 {shape}, found {tensor.dtype} {tuple(tensor.shape)}")


def expect_scales(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor is scales of that shape."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32) or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected floats {shape}, found {tensor.dtype} {tuple(tensor.shape)}")


def checked(name: str, weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    """The weight, if its parts fit together. Raises CheckpointError otherwise.

    Engines leave out the zero points of weights that are called symmetric: others than the middle would be computed
    with here and not there.
    """
    weight.validate(name)
    if scheme.symmetric and not weight.symmetric:
        middle = 2 ** (weight.bits - 1)
        raise CheckpointError(f"{name}: its zero points are not all {middle}, although the config says symmetric")
    return weight


def the_only(schemes: Schemes, what: Callable[[Scheme], Any], why: str) -> Any:
    """What all schemes agree on. Raises CheckpointError with the reason if they do not."""
    found = {what(scheme) for scheme in schemes.values()}
    if len(found) > 1:
        raise CheckpointError(f"{why}; these layers have {', '.join(sorted(map(str, found)))}")
    return found.pop()


def entry(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these entries that a config has."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def tables(what: str, found: Any) -> dict[str, dict[str, Any]]:
    """An entry of a config that maps names to settings. Raises CheckpointError if it does not."""
    entries = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in entries.values()):
        raise CheckpointError(f"{what} must map names to settings; found {type(cast(object, found)).__name__}")
    return entries


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value as an error message of one line may hold it."""
    # Python refuses to print integers of thousands of digits.
    return "a huge number" if isinstance(value, int) and abs(value) > 10**80 else repr(value)[:80]
