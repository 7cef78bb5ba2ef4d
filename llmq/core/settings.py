"""Groups of settings (a method, the grid, the calibration text). Each is declared once and checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmq.core.errors import RequestError

BITS = (2, 3, 4, 5, 6, 8)
TOKEN, TENSOR = "token", "tensor"
"""Scales of inputs that are rounded to 8 bits, as compressed-tensors calls them: one for each token, or one for all."""
GPTQ_BITS = (2, 3, 4, 8)
"""The bits of GPTQ checkpoints: what GPTQModel and its kernels know."""
GRIDS = ("auto", "minmax", "mse", "hessian", "common")
ORDERS = ("group", "static", "natural")
MLX_GROUPS = (32, 64, 128)
"""The group sizes that MLX has."""
GGUF_GROUPS = {2: 64, 4: 32, 8: 32}
"""The group size of each number of bits that llmq writes as GGUF: what a block of llama.cpp holds."""


@dataclass(frozen=True)
class Gptq:
    """Settings of GPTQ, named as in the paper."""

    damping: float = 0.05
    """This fraction of the mean of H's diagonal is added to the diagonal. 0.05 generalises better than the paper's
    0.01."""
    block_size: int = 128
    """Number of columns per lazy update. Changes the speed, never the result."""
    order: str = "group"
    """Order in which the columns are rounded. group: the most important group first, and within it the most important
    column first. static: the most important column of all first; grids are fixed before. natural: left to right."""
    passes: int = 0
    """How often every column is rounded again after all have been rounded (coordinate descent)."""

    def __post_init__(self) -> None:
        one_of("gptq order", self.order, ORDERS)
        if not 0 < self.damping < 1:
            raise RequestError(f"gptq damping must lie between 0 and 1; got {self.damping}")
        if self.block_size < 1 or self.passes < 0:
            raise RequestError(f"gptq needs a block size >= 1, passes >= 0; got {self.block_size}, {self.passes}")


@dataclass(frozen=True)
class Awq:
    """Settings of the AWQ search."""

    ratios: int = 20
    """How many exponents between 0 (no scaling) and 1 are tried in the search for the channel scales."""
    clip_steps: int = 10
    """How many clipping levels are tried per group, from 1 down to 0.5 of its range. 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.ratios < 1 or not 0 <= self.clip_steps <= 20:
            raise RequestError(f"awq needs ratios >= 1, clip steps 0 to 20; got {self.ratios}, {self.clip_steps}")


@dataclass(frozen=True)
class Tuned:
    """Settings of learned rounding. First train each block (off by default), then the whole model (end_*)."""

    steps: int = 0
    """Training steps per block. They help less for their time than training the whole model, but they need memory for
    one block only. For models that are too large to train as a whole: 100, with end_steps 0."""
    batch: int = 2
    """Micro-batches per training step. A micro-batch has 1024 tokens, or is one longer sequence."""
    rate: float = 0.005
    """Learning rate of the codes, in codes per training step."""
    scale_rate: float = 0.001
    """Learning rate of the scales, as a fraction of each scale."""
    end_steps: int = 160
    """Training steps of the whole model, after the blocks. 0: no such training. The model and its training state must
    fit into memory."""
    end_text: str = "more"
    """Extra text for training the whole model, besides the calibration sequences. more: other sequences of the
    calibration text. Or any text that --calibration accepts."""
    end_samples: int = 320
    """Number of sequences of the extra text; 0: none. `more` uses fewer if the calibration text is too short."""
    end_batch: int = 2
    """Sequences per training step of the whole model."""
    end_rate: float = 0.0
    """Learning rate of the codes when training the whole model. 0: the codes stay as they are, which halves the memory.
    0.0015 needs a fifth fewer training steps."""
    end_scale_rate: float = 0.004
    """Learning rate of scales, norms and biases when training the whole model."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("end_steps", 0), ("end_samples", 0), ("end_batch", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"tuned {name} must be at least {least}; got {getattr(self, name)}")
        for steps, names in (("steps", ("rate", "scale_rate")), ("end_steps", ("end_rate", "end_scale_rate"))):
            rates = [getattr(self, name) for name in names]
            if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
                raise RequestError(
                    f"tuned {' and '.join(names)} must be at least 0, and one of them above 0; got {rates}.\n"
                    f"To leave this training out, set {steps} to 0."
                )


@dataclass(frozen=True)
class Grid:
    """How a group of weights is mapped to integers. `group_size` -1 means one group per row."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    search: str = "auto"
    """How the grid of each group is chosen; see QuantizeConfig.grid."""
    real_zeros: bool = False
    """Whether zero points are any numbers (MLX stores them as biases) where they are not symmetric."""

    def __post_init__(self) -> None:
        one_of("grid", self.search, GRIDS)
        if self.bits not in BITS:
            raise RequestError(f"bits must be one of {listed(BITS)}; got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise RequestError(f"group size must be positive, or -1 for one group per row; got {self.group_size}")

    def on(self, columns: int) -> Grid:
        """Return these settings for rows with this many columns: -1 is replaced by a positive group size."""
        return replace(self, group_size=columns) if self.group_size == -1 else self


@dataclass(frozen=True)
class Calibration:
    """The text that the input statistics are computed from, and how much of it."""

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
    """Raise RequestError if `value` is not allowed for the setting `name`."""
    if value not in allowed:
        raise RequestError(f"{name} must be one of {listed(allowed)}; got {value!r}")


def at_revision(model: str, revision: str | None) -> str:
    """Return what `locate` takes for a model at a branch, tag or commit of the hub."""
    return model if revision is None else f"{model}@{revision}"


def listed(values: tuple[object, ...]) -> str:
    """Return the values separated by commas, for a message."""
    return ", ".join(str(value) for value in values)
