"""How the weights of one linear are stored, in any format, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import BITS, TENSOR, listed


@dataclass(frozen=True)
class Scheme:
    """What a reader must know of a linear in addition to its tensors."""

    bits: int
    group_size: int  # inputs per group; -1 for one group per row
    symmetric: bool
    act_order: bool = False  # the inputs of a group are spread over the row (GPTQ's desc_act)
    zero_offset: int = 0  # what a reader must add to the stored zero points: 1 for GPTQ v1, which stores zero - 1
    rounded_inputs: str = ""  # what enters the linear is rounded to 8 bits, with a scale for each TOKEN or TENSOR

    @classmethod
    def of(cls, bits: Any, group_size: Any, symmetric: Any, act_order: Any = False, zero_offset: int = 0) -> Scheme:
        """Return the scheme of an unchecked config. Raises CheckpointError for a value that no format allows."""
        if not _is_int(bits) or bits not in BITS:
            raise CheckpointError(f"{_shown(bits)} bits per weight; llmq reads {', '.join(map(str, BITS))}")
        if not _is_int(group_size) or (group_size < 1 and group_size != -1):
            raise CheckpointError(f"group size {_shown(group_size)}; it must be positive, or -1 for whole rows")
        for name, value in (("symmetric", symmetric), ("act order", act_order)):
            if not isinstance(value, bool):
                raise CheckpointError(f"{name} must be true or false; found {_shown(value)}")
        return cls(bits, group_size, symmetric, act_order, zero_offset)

    def changed(self, fields: Mapping[str, Any]) -> Scheme:
        """Return the scheme with new values in these fields. Raises CheckpointError like `of`."""
        new = vars(self) | dict(fields)
        rounded_inputs = new.pop("rounded_inputs")
        return replace(Scheme.of(**new), rounded_inputs=rounded_inputs)

    def groups(self, columns: int) -> int:
        """Count the groups in a row of `columns` inputs. The last group may be short."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)


Schemes = Mapping[str, Scheme]  # the scheme of each packed linear, by its name in the model


def part_of(name: str, tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    """Return a tensor of a linear. Raises CheckpointError if it is missing."""
    try:
        return tensors[f"{name}.{suffix}"]
    except KeyError:
        raise CheckpointError(f"{name}: {name}.{suffix} is missing; fetch the checkpoint again") from None


def expect_words(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor has packed words of this shape."""
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected int32 {shape}, found {tensor.dtype} {tuple(tensor.shape)}")


def expect_scales(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor has scales of this shape."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32) or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected floats {shape}, found {tensor.dtype} {tuple(tensor.shape)}")


def input_scale_of(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
    """Return the scale of a linear's inputs, None if it has none. Raises CheckpointError if it should have one."""
    if scheme.rounded_inputs != TENSOR:
        if f"{name}.input_scale" in tensors:
            raise CheckpointError(f"{name}: has a scale for its inputs, although the config gives them none")
        return None
    scale = part_of(name, tensors, "input_scale")
    expect_scales(f"{name}.input_scale", scale, (1,))
    return scale


def checked(name: str, weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    """Return the weight if its tensors fit together. Raises CheckpointError otherwise.

    Engines ignore the zero points of a symmetric weight. A zero point off the middle would give other results there.
    """
    weight.validate(name)
    if scheme.symmetric and not weight.symmetric:
        middle = 2 ** (weight.bits - 1)
        raise CheckpointError(f"{name}: its zero points are not all {middle}, although the config says symmetric")
    return weight


def zero_codes(name: str, weight: QuantizedWeight) -> Tensor:
    """Return zero points that are codes, uint8 [out, groups]. Raises CheckpointError for real ones."""
    if weight.has_real_zeros:
        raise CheckpointError(f"{name}: its zero points are no codes; only mlx stores such weights")
    return weight.zero


def with_known_bits(method: str, schemes: Schemes, known: tuple[int, ...]) -> dict[str, Scheme]:
    """Return the schemes. Raises CheckpointError if one has bits that engines do not read in this format."""
    for name, scheme in schemes.items():
        if scheme.bits not in known:
            raise CheckpointError(f"{name}: {scheme.bits} bits per weight; {method} stores {listed(known)}")
    return dict(schemes)


def the_only(schemes: Schemes, what: Callable[[Scheme], Any], why: str) -> Any:
    """Return the value that all schemes share. Raises CheckpointError with the reason if they differ."""
    values = {what(scheme) for scheme in schemes.values()}
    if len(values) > 1:
        raise CheckpointError(f"{why}; these layers have {', '.join(sorted(map(str, values)))}")
    return values.pop()


def entry(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Return the first of these entries that the config has, or the default."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def tables(what: str, found: Any) -> dict[str, dict[str, Any]]:
    """Return an entry that must map names to settings. Raises CheckpointError if it does not."""
    entries = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in entries.values()):
        raise CheckpointError(f"{what} must map names to settings; found {type(cast(object, found)).__name__}")
    return entries


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    # Python refuses to print integers of thousands of digits.
    return "a huge number" if isinstance(value, int) and abs(value) > 10**80 else repr(value)[:80]
