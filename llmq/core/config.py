"""A quantization run as it is asked for: CLI flags, `--help` and the report derive from this class and settings.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmq.core.errors import RequestError
from llmq.core.settings import BITS, Awq, Calibration, Gptq, Grid, Tuned, listed, one_of

VERSION = "0.1.0"

METHODS = ("gptq", "awq", "awq+gptq", "tuned", "rtn")
EFFORTS = ("fast", "normal", "best")
FORMATS = ("auto", "compressed-tensors", "gptq", "awq")
DEVICES = ("auto", "cpu", "cuda")
EFFORT_STEPS = ("match", "sequential")


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize the weights of a Hugging Face causal language model and write a packed checkpoint."""

    model: str
    """What to quantize: a directory, a hub id (org/name), a .gguf file, or `demo` (SmolLM2-135M-Instruct)."""
    output: Path
    """Directory for the packed checkpoint. Must be new or empty unless --overwrite or --resume is given."""
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
    blocks: str = ""
    """Quantize these blocks only, as numbers and ranges: 0-2,5. The others keep their weights. All by default."""
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
    """Replace a checkpoint, or what an unfinished run left, in the output directory."""
    resume: bool = False
    """Go on with what an interrupted run of the same request left in the output directory, with the same result. Where
    there is nothing, begin."""
    dry_run: bool = False
    """Only say what would be done: layers, sizes, memory, time. Reads no weights, writes nothing."""
    offload_dir: Path | None = None
    """Directory, on a fast disk, where hidden states of the calibration text wait instead of in memory. Without it they
    go into the output directory when they would take more than a quarter of the free memory."""
    plot: bool = False
    """Also draw llmq_report.png: error per layer, time per phase, memory over time (needs matplotlib)."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""
    gptq: Gptq = field(default_factory=Gptq)
    awq: Awq = field(default_factory=Awq)
    tuned: Tuned = field(default_factory=Tuned)

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("format", self.format, FORMATS)
        one_of("effort", self.effort, EFFORTS)
        one_of("device", self.device, DEVICES)
        for part in self.without:
            one_of("without", part, EFFORT_STEPS)
        self._check_effort()
        if self.grid == "common" and not self.symmetric:
            raise RequestError("grid common is symmetric; use minmax with --no-symmetric")
        if self.method == "awq" and self.grid not in ("auto", "minmax"):
            raise RequestError(f"awq clips the grids that span the weights; grid {self.grid} is for the other methods")
        if self.stored_as == "awq" and (self.bits != 4 or self.layer_bits):
            raise RequestError("format awq stores 4-bit weights only; use gptq or compressed-tensors for others")
        if self.resume and self.overwrite:
            raise RequestError("resume goes on with what is there, overwrite removes it; pass one of the two")
        # The nested views validate themselves.
        _ = self.grid_settings, self.calibration_settings, self.other_bits, self.chosen_blocks(1 << 20)

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
                raise RequestError(f"layer bits are NAME=BITS with bits one of {listed(BITS)}; got {each!r}")
            found.setdefault(pattern, int(bits))
        return found

    def chosen_blocks(self, depth: int) -> list[int]:
        """Indices of the blocks to quantize in a model that has so many. Raises RequestError for others."""
        if not self.blocks:
            return list(range(depth))
        chosen: set[int] = set()
        for part in self.blocks.split(","):
            first, dash, last = part.strip().partition("-")
            last = last if dash else first
            if not (first.isdigit() and last.isdigit() and int(first) <= int(last) < depth):
                rule = f"blocks are numbers and ranges such as 0-2,5, below {depth}"
                raise RequestError(f"{rule}; got {part.strip()!r} in {self.blocks!r}")
            chosen |= set(range(int(first), int(last) + 1))
        return sorted(chosen)

    @property
    def end_to_end(self) -> bool:
        """Whether the whole model is trained once its blocks are done."""
        return self.method == "tuned" and self.tuned.end_steps > 0

    @property
    def calibration_settings(self) -> Calibration:
        return Calibration(self.calibration, self.samples, self.sequence_length, self.seed)
