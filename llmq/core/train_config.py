"""The settings of llmq.train. CLI flags, `--help` and the report derive from this class."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import TENSOR, TOKEN, at_revision, one_of

LEARN = ("scales", "codes", "all")
LOSSES = ("text", "kl", "both")
STARTS = ("gptq", "rtn")
ACTIVATION_SCHEMES = ("dynamic", "static")
RATES = ("rate", "scale_rate", "outside_rate", "lora_rate")
WORST = re.compile(r"worst:(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model while its weights are quantized (QAT), and write a packed checkpoint.

    The model is an original, which is quantized first, or a packed checkpoint of any method. To recover what
    quantization lost: --loss kl. To learn a task: --loss text, on text or conversations.
    """

    model: str
    """The model to train: an original (directory, hub id, .gguf file or `demo`), or a packed checkpoint."""
    output: Path
    """Directory for the trained checkpoint. It must be new or empty, unless you pass --overwrite or --resume."""
    data: tuple[str, ...]
    """What to train on, one or several. Text: wikitext2, c4, pile, pydoc, pytopics, or a .txt, .jsonl or .parquet file;
    llmq.write makes one that the model writes. Conversations: a file whose rows hold `messages`, `conversations`, or
    `prompt` and `completion`; then only answers are learned."""
    loss: str = "text"
    """text: the next token of the text or the answer. kl: the predictions of the original model. both: their sum."""
    learn: str = "scales"
    """scales: scales, norms and biases (little memory). codes: the codes too (16 bytes of memory for each weight, for
    2 and 3 bits). all: also what is not packed, such as embeddings."""
    lora: int = 0
    """Train LoRA adapters of this rank on the packed layers instead of --learn (needs peft). They are kept in the
    directory `adapter`, and the sum of weights and adapters is quantized again. 0: no adapters."""
    original: str = ""
    """The model that a packed checkpoint was made from, for --loss kl and both."""
    bits: int = 4
    """Bits per weight for an original model: 2, 3, 4, 5, 6 or 8. A packed checkpoint has its own."""
    group_size: int = 128
    """Number of consecutive inputs that share one scale, for an original model; -1: the whole row."""
    symmetric: bool = True
    """How an original model is quantized: one fixed zero point, or with --no-symmetric one for each group."""
    start: str = "gptq"
    """How an original model is quantized before the training: gptq, or rtn (plain rounding, seconds)."""
    format: str = "auto"
    """Checkpoint format for an original model: compressed-tensors, gptq, awq or mlx."""
    calibration: str = ""
    """Text for gptq, of the start or of a merged LoRA; see llmq.quantize. Default: the first of the data."""
    calibration_samples: int = 64
    """Number of calibration sequences for gptq."""
    train_layers: str = ""
    """Train only some packed layers: worst:20% (those with the largest error in the report of the packed checkpoint,
    up to this share of the weights), or names such as down_proj or layers.0.*; several are separated by commas.
    Default: all. Norms learn in any case."""
    activations: int = 16
    """8: the inputs of packed layers are rounded to 8 bits, as engines with 8-bit matmuls do. 16: they stay as they
    are, or are rounded as a packed checkpoint says."""
    activation_scheme: str = "dynamic"
    """For --activations 8. dynamic: each token has its own scale. static: each layer has one, which learns. (Layers of
    a packed checkpoint that round their inputs already keep their way.)"""
    steps: int = 200
    """Number of training steps."""
    batch: int = 8
    """Sequences per step and process."""
    micro_batch: int = 1
    """Sequences that run at a time. Gradients of a step are summed over them."""
    sequence_length: int = 512
    """Tokens per sequence of a text; the most tokens of a conversation. Longer ones are left out, and told."""
    samples: int = 2048
    """The most sequences to take from each text or file of conversations."""
    rate: float = 0.002
    """Learning rate of the codes, in codes per step. Longer trainings need lower ones (docs/qat.md): 0.003 for 200
    steps, 0.0012 for 800. Codes of 8 bits are 16 times finer than those of 4: for the same steps of the weights, use 16
    times as much."""
    scale_rate: float = 0.002
    """Learning rate of scales, norms and biases, as a fraction of each scale."""
    outside_rate: float = 2e-5
    """Learning rate of what is not packed, for --learn all."""
    lora_rate: float = 2e-4
    """Learning rate of LoRA adapters."""
    checks: int = 10
    """How often the loss on held-out sequences is measured. The best state is kept."""
    patience: int = 0
    """Stop early after this many checks without a better one. 0: never."""
    checkpointing: bool = False
    """Keep only the inputs of each block and compute the rest again: less memory, a third more time."""
    seed: int = 0
    """Random seed for the order of the sequences and for the pieces of a text."""
    device: str = "auto"
    """Device to compute on: auto (cuda if there is a GPU), cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the checkpoint or the unfinished training in the output directory."""
    resume: bool = False
    """Continue an interrupted training with the same settings. The result is the same as without the interruption."""
    dry_run: bool = False
    """Only print what learns, and the memory, the disk and the time that it takes. Writes nothing."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Use it only for models whose author you trust."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; org/name@REVISION means the same."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(self.data))
        if not self.data:
            raise RequestError("data is missing: name a text or a file to train on")
        one_of("loss", self.loss, LOSSES)
        one_of("learn", self.learn, LEARN)
        one_of("start", self.start, STARTS)
        one_of("format", self.format, ("auto", "compressed-tensors", "gptq", "awq", "mlx"))
        if self.activations not in (8, 16):
            raise RequestError(f"activations must be 8 or 16 bits; got {self.activations}")
        one_of("activation scheme", self.activation_scheme, ACTIVATION_SCHEMES)
        if self.activation_scheme == "static" and (self.activations == 16 or self.lora):
            raise RequestError("activation scheme static is for --activations 8, and not for --lora")
        for name, least in (("steps", 1), ("batch", 1), ("micro_batch", 1), ("samples", 2), ("checks", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name.replace('_', ' ')} must be at least {least}; got {getattr(self, name)}")
        if self.sequence_length < 2 or self.patience < 0:
            raise RequestError("sequence length must be at least 2 tokens, and patience at least 0")
        if self.batch % self.micro_batch:
            raise RequestError(f"batch must be a multiple of micro batch; got {self.batch} and {self.micro_batch}")
        if self.lora < 0 or (self.lora and self.learn != TrainConfig.learn):
            raise RequestError(f"lora is a rank of at least 1, without --learn; got {self.lora} and {self.learn}")
        rates = {name: getattr(self, name) for name in RATES}
        for name, value in rates.items():
            if not 0 <= value < math.inf:
                raise RequestError(f"{name.replace('_', ' ')} must be a finite number of at least 0; got {value}")
        if self.train_layers.startswith("worst") and (
            (found := WORST.fullmatch(self.train_layers)) is None or not 0 < float(found[1]) <= 100
        ):
            raise RequestError(f"train layers are names, or worst:20% and the like; got {self.train_layers!r}")
        used = {"scales": RATES[1:2], "codes": RATES[:2], "all": RATES[:3]}[self.learn]
        if not any(rates[name] for name in (("lora_rate",) if self.lora else used)):
            raise RequestError("nothing would learn: the learning rates of what should learn are 0")
        if self.resume and self.overwrite:
            raise RequestError("resume continues the earlier training, overwrite removes it; pass only one of the two")

    def quantizing(self, model: str, output: Path, **how: Any) -> QuantizeConfig:
        """Return the request that quantizes a model with this calibration. `how`: its other settings."""
        return QuantizeConfig(
            model,
            output,
            calibration=self.calibration or self.data[0],
            samples=self.calibration_samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            **how,
        )

    @property
    def source(self) -> str:
        """Return the model and its revision, as `locate` takes them."""
        return at_revision(self.model, self.revision)

    @property
    def inputs(self) -> str:
        """Return how layers are told to round their inputs, as in `Scheme`; empty: as a packed checkpoint says."""
        return "" if self.activations == 16 else TENSOR if self.activation_scheme == "static" else TOKEN

    @property
    def needs_original(self) -> bool:
        """Return whether the loss looks at the predictions of the original model."""
        return self.loss != "text"
