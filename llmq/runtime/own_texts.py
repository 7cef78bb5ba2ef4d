"""Lets a model write texts of its own, as data for a training or a calibration."""

import json
from dataclasses import dataclass
from pathlib import Path

from llmq.calibration.block_runner import Compute
from llmq.calibration.self_generated import SELF, sequences_by
from llmq.calibration.texts import check_context, windows
from llmq.checkpoint.output_dir import may_write_in, written_whole
from llmq.core.device import pick_device, product_dtype
from llmq.core.errors import RequestError
from llmq.core.settings import Calibration, at_revision
from llmq.models.model_source import ModelSource


@dataclass(frozen=True)
class WriteConfig:
    """Let a model write texts of its own, as data for llmq.train or as a calibration text of llmq.quantize.

    Each text begins with the token that begins texts. The first words are drawn hotter, so that all topics come up. Or
    the texts go on from pieces of a text of yours, and are like it, in form and in topics.
    """

    model: str
    """An original model: directory, hub id, .gguf file or `demo`."""
    output: Path
    """The file to write, with a name that ends in .jsonl: one row for each text."""
    samples: int = 1024
    """Number of texts."""
    sequence_length: int = 256
    """Tokens of each text."""
    begin_with: str = ""
    """A text whose pieces the texts go on from: wikitext2, c4, pile, pydoc, pytopics, or a .txt, .jsonl or .parquet
    file. Default: no text."""
    begin_tokens: int = 64
    """Tokens of each piece."""
    min_p: float = 0.0
    """A token is not drawn if its probability is less than this share of the largest one. 0: the model's own
    distribution, in which small models soon lose the thread. The more of it, the more they repeat themselves, at
    0.05 without end."""
    seed: int = 0
    """Seed of the random choices."""
    device: str = "auto"
    """Device to compute on: auto (cuda if there is a GPU), cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the output file if it is there."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models you trust."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; org/name@REVISION means the same."""

    def __post_init__(self) -> None:
        _ = self.sizes
        if not 0 <= self.min_p < 1:
            raise RequestError(f"min p must be at least 0 and less than 1; got {self.min_p}")
        if self.begin_with and not 1 < self.begin_tokens < self.sequence_length:
            raise RequestError(
                f"begin tokens must be at least 2, and less than the sequence length of {self.sequence_length}; "
                f"got {self.begin_tokens}"
            )

    @property
    def sizes(self) -> Calibration:
        """Return how many texts there will be, and how long. Raises RequestError if that makes no sense."""
        return Calibration(SELF, self.samples, self.sequence_length, self.seed)


def write_texts(config: WriteConfig, progress: bool = False) -> Path:
    """Write the texts as rows {"text": …}; returns the file, which is there whole or not at all.

    Raises RequestError if the request cannot be met.
    """
    path = config.output.expanduser()
    if path.suffix != ".jsonl":
        raise RequestError(f"the texts are rows of a .jsonl file, so --output must end in .jsonl; got {path.name!r}")
    if path.is_dir() or (path.exists() and not config.overwrite):
        raise RequestError(f"{path} is there already; choose another --output, or replace a file with --overwrite")
    if not may_write_in(path.parent):
        raise RequestError(f"{path} cannot be written: {path.parent} is not a directory that llmq may write to")
    device = pick_device(config.device)
    source = ModelSource(at_revision(config.model, config.revision), config.trust_remote_code)
    check_context(source.skeleton.config, config.sequence_length)
    starts = None
    if config.begin_with:
        pieces = Calibration(config.begin_with, config.samples, config.begin_tokens, config.seed)
        starts = windows(source.tokenizer, pieces)
    # On 2 cores with AVX-512 BF16 (135M weights, 2026-11-29, before the static cache): 694 tokens/s for 80 texts at a
    # time in bfloat16, 312 for 40 in float32.
    compute = Compute(device, precision=product_dtype(device))
    sequences = sequences_by(source, config.sizes, compute, progress, starts, config.min_p)
    texts = source.tokenizer.batch_decode(sequences, skip_special_tokens=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as new:
        new.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
