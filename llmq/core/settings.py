"""The settings of one thing each (a method, a grid, the calibration text), declared once and checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmq.core.errors import RequestError

BITS = (2, 3, 4, 8)
GRIDS = ("auto", "minmax", "mse", "hessian", "common")
ORDERS = ("group", "static", "natural")


@dataclass(frozen=True)
class Gptq:
    """Settings of GPTQ that the paper names."""

    damping: float = 0.05
    """Added to the diagonal of H, as a fraction of its mean. 0.05 generalises better than the paper's 0.01."""
    block_size: int = 128
    """Columns per lazy update. Changes speed, never the result."""
    order: str = "group"
    """In which columns are rounded: group (groups by importance, columns within them likewise), static (all columns by
    importance, grids fixed beforehand) or natural."""
    passes: int = 0
    """Times that every column is looked at again once all are rounded (coordinate descent)."""

    def __post_init__(self) -> None:
        one_of("gptq order", self.order, ORDERS)
        if not 0 < self.damping < 1:
            raise RequestError(f"gptq damping must lie between 0 and 1; got {self.damping}")
        if self.block_size < 1 or self.passes < 0:
            raise RequestError(
                f"gptq needs a block size from 1 on and passes from 0; got {self.block_size}, {self.passes}"
            )


@dataclass(frozen=True)
class Awq:
    """Settings of the AWQ search."""

    ratios: int = 20
    """Exponents tried between 0 (no scaling) and 1 when searching the channel scales."""
    clip_steps: int = 10
    """Clipping levels tried per group between 1 and 0.5 of its range; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.ratios < 1 or not 0 <= self.clip_steps <= 20:
            raise RequestError(f"awq needs a ratio and 0 to 20 clip steps; got {self.ratios}, {self.clip_steps}")


@dataclass(frozen=True)
class Tuned:
    """Settings of learned rounding: block by block where asked for, then (end_*) of the whole model."""

    steps: int = 0
    """Steps of training per block. They bring less for their time than training from end to end, but need no more
    memory than a block: 100, with end_steps 0, for models too large to train as a whole."""
    batch: int = 2
    """Micro-batches per step: 1024 tokens each, or one longer sequence."""
    rate: float = 0.005
    """Learning rate of the codes, in codes per step."""
    scale_rate: float = 0.001
    """Learning rate of the scales, relative to them."""
    end_steps: int = 160
    """Steps of training from end to end, after the blocks; 0 leaves it out. The model and its training state must fit
    into memory."""
    end_text: str = "more"
    """What to train on besides the calibration sequences: more (others of their text), or any text that they may be."""
    end_samples: int = 320
    """Sequences of that text; 0 for none. Of `more` fewer, where there are no more."""
    end_batch: int = 2
    """Calibration sequences per such step."""
    end_rate: float = 0.0
    """Learning rate of the codes there. 0 keeps them, in half the memory; 0.0015 saves a fifth of the steps."""
    end_scale_rate: float = 0.004
    """Learning rate of scales, norms and biases there."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("end_steps", 0), ("end_samples", 0), ("end_batch", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"tuned {name} must be at least {least}; got {getattr(self, name)}")
        for steps, names in (("steps", ("rate", "scale_rate")), ("end_steps", ("end_rate", "end_scale_rate"))):
            rates = [getattr(self, name) for name in names]
            if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
                raise RequestError(
                    f"tuned {' and '.join(names)} must be numbers from 0 on, one of them above; got {rates}.\n"
                    f"To leave this training out, set {steps} to 0."
                )


@dataclass(frozen=True)
class Grid:
    """How a group of weights is laid on integers. `group_size` -1 means one group per row."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    search: str = "auto"
    """Which of the possible grids a group gets; see QuantizeConfig.grid."""

    def __post_init__(self) -> None:
        one_of("grid", self.search, GRIDS)
        if self.bits not in BITS:
            raise RequestError(f"bits must be one of {listed(BITS)}; got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise RequestError(f"group size must be positive, or -1 for one group per row; got {self.group_size}")

    def on(self, columns: int) -> Grid:
        """The same for rows of so many columns: with a positive group size."""
        return replace(self, group_size=columns) if self.group_size == -1 else self


@dataclass(frozen=True)
class Calibration:
    """Which text the input statistics come from, and how much of it."""

    text: str = "pile"
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RequestError(f"samples must be at least 1; got {self.samples}")
        if self.sequence_length < 2:
            raise RequestError(f"sequence length must be at least 2 tokens; got {self.sequence_length}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {listed(allowed)}; got {value!r}")


def listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
