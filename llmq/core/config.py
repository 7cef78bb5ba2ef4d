"""The settings of a quantization run. CLI flags, `--help` and the report derive from this class and settings.py."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from llmq.core.budget import Budget, budget_of, spending_of
from llmq.core.errors import RequestError
from llmq.core.format_limits import check_format, fits_gptq, gguf_group
from llmq.core.settings import (
    BITS,
    Awq,
    Calibration,
    Gptq,
    Grid,
    Tuned,
    at_revision,
    listed,
    one_of,
)

VERSION = "0.1.0"

METHODS = ("gptq", "awq", "awq+gptq", "tuned", "rtn")
EFFORTS = ("fast", "normal", "best")
FORMATS = ("auto", "compressed-tensors", "gptq", "awq", "mlx", "gguf")
EFFORT_STEPS = ("match", "sequential")
EXPERT_STATISTICS = ("routed", "layer", "all-tokens")


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize the weights of a Hugging Face causal language model and write a packed checkpoint."""

    model: str
    """The model to quantize: a directory, a hub id (org/name), a .gguf file, or `demo` (SmolLM2-135M-Instruct)."""
    output: Path
    """Directory for the packed checkpoint. It must be new or empty, unless you pass --overwrite or --resume."""
    method: str = "gptq"
    """How to choose the codes. gptq: the best result for its time. tuned: gptq, then training (minutes to hours). awq:
    for models with outliers in the activations. awq+gptq: both. rtn: plain rounding, seconds, no calibration text."""
    bits: int = 4
    """Bits per weight: 2, 3, 4, 5, 6 or 8."""
    group_size: int = 128
    """Number of consecutive inputs that share one scale; -1: the whole row. Lowered to 64 or 32 if 128 does not divide
    the input size of every layer."""
    layer_bits: tuple[str, ...] = ()
    """Other bits for some layers, written as NAME=BITS: down_proj=8 layers.0.*=8. A * stands for any characters. If
    several match a layer, the first one counts. Layers that engines fuse (q, k, v; gate, up) need the same bits."""
    budget: float = 0.0
    """Instead of --bits: stored bits per weight on average, with scales, such as 3.5. llmq measures how much each layer
    loses, and chooses the bits of all layers so that the model loses least. This doubles the time. 0: no budget."""
    size: str = ""
    """The same for a size of the whole checkpoint, such as 2.5GB or 700MiB."""
    widths: tuple[int, ...] = ()
    """Bits that --budget and --size may choose from. Default: all that the format stores. For vLLM's fastest kernels:
    4 8."""
    blocks: str = ""
    """Quantize only these blocks, given as numbers and ranges: 0-2,5. The other blocks keep their weights. Default: all
    blocks."""
    symmetric: bool = True
    """Use one fixed zero point, in the middle of the codes. --no-symmetric stores a zero point per group instead."""
    grid: str = "auto"
    """How the grid (scale, zero point) of each group is chosen. minmax: spans the group's weights. mse: least error of
    the weights. hessian: least error of the layer's output. auto: hessian if the method uses calibration text, else
    minmax. common: the grid of other tools (symmetric, scale max/7.5 at 4 bit), for comparisons."""
    effort: str = "normal"
    """normal: each layer also corrects the errors of the layers before it, as far as this helps on held-out text. fast:
    each layer only reproduces its own outputs; takes less time. best: gptq also tries optional steps for every layer
    and keeps those that help on held-out text."""
    without: tuple[str, ...] = ()
    """Steps of the effort to leave out, to measure how much they help. match: the weights move towards the outputs of
    the original model. sequential: a layer sees the outputs of the quantized layers before it in its block (match
    needs this)."""
    expert_statistics: str = "routed"
    """What counts for an expert in a mixture of experts. routed: the tokens that the router sends to it, and those of
    all experts as far as these are few. layer: the tokens of all experts. all-tokens: every expert runs on every token,
    which takes many times as long. The last two are for comparisons."""
    format: str = "auto"
    """Checkpoint format: compressed-tensors (read by transformers, vLLM and SGLang); gptq (2, 3, 4, 8 bit); awq (4
    bit); mlx (read by mlx_lm; --no-symmetric takes no more bytes there); gguf (symmetric; read by llama.cpp: Q4_0 at 4
    bit, Q8_0 at 8, Q2_0 at 2, in groups of the size that these types have). auto: compressed-tensors for symmetric
    weights; otherwise the format that engines serve: awq at 4 bit, gptq at 2, 3 and 8."""
    calibration: str = Calibration.text
    """Calibration text: wikitext2, c4 or pile (downloaded); pydoc or pytopics (offline); a .txt, .jsonl or .parquet
    file, whose rows hold a `text` or a conversation (`messages`, `conversations`, or `prompt` and `completion`); or
    self (the model writes the text itself, so the whole model must fit into memory)."""
    samples: int = Calibration.samples
    """Number of calibration sequences. Every tenth is held out: it measures errors and decides between options."""
    sequence_length: int = Calibration.sequence_length
    """Tokens per calibration sequence."""
    seed: int = Calibration.seed
    """Random seed that chooses which pieces of the text become calibration sequences."""
    device: str = "auto"
    """Device to compute on: auto (cuda if there is a GPU), cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the checkpoint or the unfinished run in the output directory."""
    resume: bool = False
    """Continue an interrupted run with the same settings in the output directory. The result is the same as without
    the interruption. If there is no such run, start a new one."""
    dry_run: bool = False
    """Only print the plan: layers, sizes, memory, time. Writes nothing, and reads weights only to measure for a
    budget: then it also prints how many layers get which bits, and the KL to expect."""
    offload_dir: Path | None = None
    """Directory on a fast disk. The hidden states of the calibration text are kept there instead of in memory. Without
    it, they go into the output directory if they would take more than a quarter of the free memory."""
    plot: bool = False
    """Also draw llmq_report.png: error per layer, time per phase, memory over time. Needs matplotlib."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Use it only for models whose author you trust."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; org/name@REVISION means the same."""
    gptq: Gptq = field(default_factory=Gptq)
    awq: Awq = field(default_factory=Awq)
    tuned: Tuned = field(default_factory=Tuned)

    def __post_init__(self) -> None:
        self._take_python_types()
        one_of("method", self.method, METHODS)
        one_of("format", self.format, FORMATS)
        one_of("effort", self.effort, EFFORTS)
        one_of("expert statistics", self.expert_statistics, EXPERT_STATISTICS)
        if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", self.device):
            raise RequestError(f"device must be one of auto, cpu, cuda, cuda:N; got {self.device!r}")
        for step in self.without:
            one_of("without", step, EFFORT_STEPS)
        self._check_effort()
        self._check_budget()
        if self.grid == "common" and not self.symmetric:
            raise RequestError("grid common is symmetric; with --no-symmetric, use grid minmax")
        if self.method == "awq" and self.grid not in ("auto", "minmax"):
            raise RequestError(f"awq works with grid minmax only; got {self.grid}; use minmax, or another method")
        asked = Grid(self.bits, self.group_size, self.symmetric, self.grid)
        check_format(self.stored_as, self.all_bits, asked, QuantizeConfig.group_size)
        if self.resume and self.overwrite:
            raise RequestError("resume continues the earlier run, overwrite removes it; pass only one of the two")
        # The nested settings check themselves when they are made.
        _ = self.grid_settings, self.calibration_settings, self.other_bits, self.chosen_blocks(1 << 20)

    def _take_python_types(self) -> None:
        """Take what people pass in Python: paths as text, text as a path, numbers as text. Raises RequestError else."""
        for name, kind in (("model", str), ("calibration", str), ("output", Path), ("offload_dir", Path)):
            value = getattr(self, name)
            if isinstance(value, str | os.PathLike):
                object.__setattr__(self, name, kind(value))
            elif value is not None or name != "offload_dir":
                raise RequestError(f"{name} must be a path or a name; got {value!r}")
        for name in ("bits", "group_size", "samples", "sequence_length", "seed"):
            value = getattr(self, name)
            try:
                whole = int(value)
            except (TypeError, ValueError):
                whole = None
            if whole is None or not (isinstance(value, str) or whole == value):
                raise RequestError(f"{name} must be a whole number; got {value!r}")
            object.__setattr__(self, name, whole)
        for name in ("layer_bits", "without"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, value in spending_of(self.budget, self.size, self.widths).items():
            object.__setattr__(self, name, value)

    def _check_effort(self) -> None:
        """Raise RequestError if the effort does not fit the other settings."""
        if self.samples < 2 and (self.method == "tuned" or self.effort == "best"):
            what = "method tuned" if self.method == "tuned" else "effort best"
            raise RequestError(f"samples must be at least 2 for {what}, which needs held-out text; got {self.samples}")
        if self.method == "tuned" and self.effort == "fast":
            raise RequestError("tuned follows the original model's outputs, but effort fast ignores them; use normal")
        if self.method == "tuned" and "match" in self.without:
            raise RequestError("tuned follows the original model's outputs, so it needs match; remove --without match")
        if self.effort == "best" and self.method in ("rtn", "awq"):
            raise RequestError(f"effort best tries optional steps of gptq; method {self.method} has none; use normal")
        if self.without and (self.effort == "fast" or (self.method == "rtn" and self.grid != "hessian")):
            what = f"method {self.method} with effort {self.effort}"
            raise RequestError(f"{what} has no step {' or '.join(self.without)}; remove --without")
        if "sequential" in self.without and "match" not in self.without:
            # Attention and MLP would each correct all of the error in the residual stream: twice too much.
            raise RequestError("match needs sequential; to leave out both: --without match sequential")

    def _check_budget(self) -> None:
        """Raise RequestError if a budget does not fit the other settings."""
        if self.spending is None:
            return
        if self.bits != QuantizeConfig.bits:
            raise RequestError(
                f"a budget chooses the bits; got bits {self.bits}, too; pass one of bits, budget and size"
            )
        if self.method == "rtn":
            raise RequestError("method rtn uses no text, and a budget is measured on text; use another method")
        if self.samples < 2:
            raise RequestError(
                f"samples must be at least 2 for a budget, which needs held-out text; got {self.samples}"
            )
        if self.dry_run and self.calibration == "self":
            raise RequestError("a dry run writes no text, but budgets are measured on it; choose another --calibration")

    @property
    def spending(self) -> Budget | None:
        """Return what `budget` or `size` allows; None without them."""
        return budget_of(self.budget, self.size, self.widths, self.stored_as)

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Return all numbers of bits that layers may have, from the fewest."""
        chosen = (self.bits,) if self.spending is None else self.spending.widths
        return tuple(sorted({*chosen, *self.other_bits.values()}))

    @property
    def grid_settings(self) -> Grid:
        """Return the settings of the rounding grid."""
        group_size = gguf_group(self.all_bits) if self.stored_as == "gguf" else self.group_size
        real_zeros = self.stored_as == "mlx" and not self.symmetric
        return Grid(self.bits, group_size, self.symmetric, self.grid, real_zeros)

    @property
    def streamed_as(self) -> str:
        """Return the format that blocks are written in as they are finished. A GGUF file is made of all of them."""
        return "compressed-tensors" if self.stored_as == "gguf" else self.stored_as

    @property
    def source(self) -> str:
        """Return the model and its revision, as `locate` takes them."""
        return at_revision(self.model, self.revision)

    @property
    def stored_as(self) -> str:
        """Return the checkpoint format to write, with `auto` decided."""
        if self.format != "auto":
            return self.format
        if self.symmetric:
            return "compressed-tensors"
        has_budget = bool(self.budget or self.size)
        if self.bits == 4 and not (self.layer_bits or has_budget):
            return "awq"
        asked = self.widths if has_budget else (self.bits,)
        return "gptq" if fits_gptq((*asked, *self.other_bits.values())) else "compressed-tensors"

    @property
    def other_bits(self) -> dict[str, int]:
        """Return the bits for each pattern of `layer_bits`. Raises RequestError if one is not NAME=BITS."""
        bits_of: dict[str, int] = {}
        for setting in self.layer_bits:
            pattern, equals, bits = setting.partition("=")
            if not (pattern and equals) or bits not in map(str, BITS):
                raise RequestError(f"layer bits are NAME=BITS with bits one of {listed(BITS)}; got {setting!r}")
            bits_of.setdefault(pattern, int(bits))
        return bits_of

    def chosen_blocks(self, depth: int) -> list[int]:
        """Return the indices of the blocks to quantize in a model with `depth` blocks.

        Raises RequestError if `blocks` is malformed or names a block that the model does not have.
        """
        if not self.blocks:
            return list(range(depth))
        chosen = set[int]()
        for text in map(str.strip, self.blocks.split(",")):
            first, dash, last = text.partition("-")
            last = last if dash else first
            if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < depth):
                rule = f"blocks are numbers and ranges such as 0-2,5, below {depth}"
                raise RequestError(f"{rule}; got {text!r} in {self.blocks!r}")
            chosen |= set(range(int(first), int(last) + 1))
        return sorted(chosen)

    @property
    def end_to_end(self) -> bool:
        """Tell whether the whole model is trained after its blocks are quantized."""
        return self.method == "tuned" and self.tuned.end_steps > 0

    @property
    def calibration_settings(self) -> Calibration:
        """Return the settings of the calibration text."""
        return Calibration(self.calibration, self.samples, self.sequence_length, self.seed)
