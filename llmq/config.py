"""Every setting of a quantization run, declared once: CLI flags, `--help` and the report derive from these classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from llmq.errors import RequestError

VERSION = "0.1.0"

BITS = (2, 3, 4, 8)
METHODS = ("gptq", "awq", "awq+gptq", "tuned", "rtn")
GRIDS = ("auto", "minmax", "mse", "hessian", "common")
ORDERS = ("group", "static", "natural")
EFFORTS = ("fast", "normal", "best")
FORMATS = ("auto", "compressed-tensors", "gptq", "awq")
DEVICES = ("auto", "cpu", "cuda")
PARTS = ("match", "sequential")


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


@dataclass(frozen=True)
class Awq:
    """Settings of the AWQ search."""

    ratios: int = 20
    """Exponents tried between 0 (no scaling) and 1 when searching the channel scales."""
    clip_steps: int = 10
    """Clipping levels tried per group between 1 and 0.5 of its range; 0 switches clipping off."""


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

    def check(self) -> None:
        """Raise RequestError for settings that cannot train."""
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
        _one_of("grid", self.search, GRIDS)
        if self.bits not in BITS:
            raise RequestError(f"bits must be one of {_listed(BITS)}; got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise RequestError(f"group size must be positive, or -1 for one group per row; got {self.group_size}")


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


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize the weights of a Hugging Face causal language model and write a packed checkpoint."""

    model: str
    """What to quantize: a directory, a hub id (org/name), a .gguf file, or `demo` (SmolLM2-135M-Instruct)."""
    output: Path
    """Directory for the packed checkpoint. Must be new or empty unless --overwrite is given."""
    method: str = "gptq"
    """gptq (best for its time), tuned (gptq, then training: minutes to hours), awq (for activation
    outliers), awq+gptq or rtn (needs no calibration text, seconds)."""
    bits: int = 4
    """Bits per weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Consecutive inputs that share one scale; -1 for a whole row. Lowered to 64 or 32 where 128 does not divide."""
    layer_bits: tuple[str, ...] = ()
    """Other bits for some layers, as NAME=BITS with * for any part of the name: down_proj=8 layers.0.*=8. The first
    that fits a layer counts. Layers that engines fuse (q, k, v; gate, up) need the same."""
    symmetric: bool = True
    """A fixed zero point in the middle of the codes. --no-symmetric stores a zero point per group."""
    grid: str = "auto"
    """Each group's grid: minmax spans its weights, mse has the least error, hessian the least error weighted by what it
    does to the layer's output. auto: hessian where there is calibration text, else minmax. common: what other tools
    have, a symmetric scale of max/7.5 at 4 bit; to compare with."""
    effort: str = "normal"
    """normal: each layer makes up for the errors of those before it, as far as held-out text agrees. fast: it only
    reproduces its own outputs, in less time. best: gptq also tries optional steps for every layer, and keeps those that
    help on held-out text."""
    without: tuple[str, ...] = ()
    """Parts of the effort to leave out, to measure what they bring: match (weights move towards the original outputs),
    sequential (layers of a block see the quantized ones before them, which match needs)."""
    format: str = "auto"
    """Checkpoint format: compressed-tensors (read by transformers, vLLM and SGLang), gptq or awq (4 bit). auto:
    compressed-tensors for symmetric weights, else awq at 4 bit and gptq at others, which engines serve."""
    calibration: str = Calibration.text
    """Text to calibrate on: wikitext2, c4, pile (downloaded), pydoc, pytopics (offline), a .txt/.jsonl/.parquet, or
    self (the model writes it, for which it must fit into memory)."""
    samples: int = Calibration.samples
    """Number of calibration sequences; every tenth is held out, to measure and to decide."""
    sequence_length: int = Calibration.sequence_length
    """Tokens per calibration sequence."""
    seed: int = Calibration.seed
    """Seed for the choice of calibration windows."""
    device: str = "auto"
    """Where to compute: auto (cuda when present), cpu or cuda."""
    overwrite: bool = False
    """Replace a checkpoint that is already in the output directory."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""
    gptq: Gptq = field(default_factory=Gptq)
    awq: Awq = field(default_factory=Awq)
    tuned: Tuned = field(default_factory=Tuned)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("format", self.format, FORMATS)
        _one_of("effort", self.effort, EFFORTS)
        _one_of("device", self.device, DEVICES)
        for part in self.without:
            _one_of("without", part, PARTS)
        if not 0 < self.gptq.damping < 1:
            raise RequestError(f"gptq damping must lie between 0 and 1; got {self.gptq.damping}")
        if self.gptq.block_size < 1:
            raise RequestError(f"gptq block size must be at least 1; got {self.gptq.block_size}")
        if self.gptq.passes < 0:
            raise RequestError(f"gptq passes must not be negative; got {self.gptq.passes}")
        _one_of("gptq order", self.gptq.order, ORDERS)
        if self.awq.ratios < 1 or not 0 <= self.awq.clip_steps <= 20:
            raise RequestError("awq needs at least 1 ratio and 0 to 20 clip steps")
        self._check_effort()
        self.tuned.check()
        if self.grid == "common" and not self.symmetric:
            raise RequestError("grid common is symmetric; use minmax with --no-symmetric")
        if self.method == "awq" and self.grid not in ("auto", "minmax"):
            raise RequestError(f"awq clips the grids that span the weights; grid {self.grid} is for the other methods")
        if self.stored_as == "awq" and (self.bits != 4 or self.layer_bits):
            raise RequestError("format awq stores 4-bit weights only; use gptq or compressed-tensors for others")
        # The nested views validate themselves.
        _ = self.grid_settings, self.calibration_settings, self.other_bits

    def _check_effort(self) -> None:
        """Raise RequestError for what would do nothing, or has nothing to go by."""
        if self.samples < 2 and (self.method == "tuned" or self.effort == "best"):
            what = "method tuned" if self.method == "tuned" else "effort best"
            raise RequestError(f"samples must be at least 2 for {what}, which holds some out; got {self.samples}")
        if self.method == "tuned" and self.effort == "fast":
            raise RequestError("tuned follows the original model's outputs, which effort fast leaves out; use normal")
        if self.method == "tuned" and "match" in self.without:
            raise RequestError("tuned follows the original model's outputs: it cannot do without match")
        if self.effort == "best" and self.method in ("rtn", "awq"):
            raise RequestError(f"effort best tries steps around gptq, which {self.method} has not; use normal")
        if self.without and (self.effort == "fast" or (self.method == "rtn" and self.grid != "hessian")):
            what = f"method {self.method} with effort {self.effort}"
            raise RequestError(f"{what} has no part {' or '.join(self.without)} that could be left out")
        if "sequential" in self.without and "match" not in self.without:
            # Attention and MLP would each add all that the residual stream lost: in every block, twice too much.
            raise RequestError("match needs sequential; leave out both: --without match sequential")

    @property
    def grid_settings(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric, self.grid)

    @property
    def stored_as(self) -> str:
        """The format that is written."""
        if self.format != "auto":
            return self.format
        if self.symmetric:
            return "compressed-tensors"
        return "awq" if self.bits == 4 and not self.layer_bits else "gptq"

    @property
    def other_bits(self) -> dict[str, int]:
        """`layer_bits`, by pattern. Raises RequestError for what is not NAME=BITS."""
        found: dict[str, int] = {}
        for each in self.layer_bits:
            pattern, equals, bits = each.partition("=")
            if not (pattern and equals) or bits not in map(str, BITS):
                raise RequestError(f"layer bits are NAME=BITS with bits one of {_listed(BITS)}; got {each!r}")
            found.setdefault(pattern, int(bits))
        return found

    @property
    def end_to_end(self) -> bool:
        """Whether the whole model is trained once its blocks are done."""
        return self.method == "tuned" and self.tuned.end_steps > 0

    @property
    def calibration_settings(self) -> Calibration:
        return Calibration(self.calibration, self.samples, self.sequence_length, self.seed)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {_listed(allowed)}; got {value!r}")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
