"""Fill the gaps of a text: each `<unk>` becomes a word that a model draws, given all that is before it.

WikiText in its old form has `<unk>` for every rare word: one word in 18, and three tokens for a modern tokenizer. A
model that is trained on it learns to write `<unk>`, and sees no rare word. With the gaps filled, it is ordinary text.

    python scripts/fill_gaps.py --model demo-dithered --text wikitext2-valid.txt --output filled.txt
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm
from transformers import StaticCache

from llmq.calibration.self_generated import can_use_static_cache, drawn
from llmq.calibration.texts import read_text
from llmq.checkpoint.output_dir import may_write_in, written_whole
from llmq.cli import run
from llmq.core.device import product_dtype
from llmq.core.errors import RequestError
from llmq.models.model_source import ModelSource

_GAP = -1  # in the tokens of a piece: here is a word missing
_PIECE = 1700  # characters that are written in one go, at least; what is before them is not seen
_ROWS = 84  # pieces at a time
_LONGEST = 5  # tokens of a word


@dataclass(frozen=True)
class FillConfig:
    """Let a model fill the gaps of a text with words of its own."""

    text: Path
    """The text."""
    output: Path
    """The file to write."""
    model: str = "demo"
    """An original model: directory, hub id, .gguf file, or demo for the demo model."""
    gap: str = "<unk>"
    """What stands for a missing word."""
    seed: int = 0
    """Seed of the random choices."""


@dataclass
class _Row:
    """A piece of the text, and how far it is written. `inside`: tokens of the word that fills a gap, so far."""

    piece: list[int]
    written: list[int] = field(default_factory=list)
    at: int = 0
    inside: int = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.piece) and not self.inside

    def take(self, first: int, more: int, goes_on: bool) -> int:
        """Write a token: the next one of a word, the first one of a word, or the next one of the text."""
        if self.inside and goes_on and self.inside < _LONGEST:
            token, self.inside = more, self.inside + 1
        elif self.at == len(self.piece):
            self.inside = 0
            return more  # the piece has ended; what others wait for is not written
        else:
            token = self.piece[self.at]
            self.at, self.inside = self.at + 1, int(token == _GAP)
            token = first if token == _GAP else token
        self.written.append(token)
        return token


def pieces_of(text: str) -> list[str]:
    """Cut a text into pieces of whole lines."""
    pieces, lines = list[str](), ""
    for line in text.splitlines(keepends=True):
        lines += line
        if len(lines) > _PIECE:
            pieces.append(lines)
            lines = ""
    return [*pieces, lines] if lines else pieces


def tokens_of(piece: str, gap: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a piece, with _GAP for each missing word and the space before it."""
    tokens = list[int]()
    for number, part in enumerate(re.split(rf" ?{re.escape(gap)}", piece)):
        tokens += [_GAP] if number else []
        tokens += tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    return tokens


def fill(config: FillConfig) -> None:
    """Write the text without gaps. Raises RequestError if it has none, or if the model has no cache of fixed size."""
    text = read_text(str(config.text))
    if config.gap not in text:
        raise RequestError(f"{config.text} has no {config.gap!r}, so there is nothing to fill; see --gap")
    if not may_write_in(config.output.parent):
        raise RequestError(f"{config.output} cannot be written: its directory is not one that llmq may write to")
    source, device = ModelSource(config.model), torch.device("cpu")
    if not can_use_static_cache(source.skeleton):
        name = type(source.skeleton).__name__
        raise RequestError(f"{name} has no cache of fixed size, which this needs; fill with another model")
    words = _words(source.tokenizer, source.skeleton.config.vocab_size)
    pieces = [tokens_of(piece, config.gap, source.tokenizer) for piece in pieces_of(text)]
    model = source.load_all(device, product_dtype(device)).requires_grad_(False)
    torch.manual_seed(config.seed)
    # Pieces of the same length beside each other, so that they end together.
    order, filled = sorted(range(len(pieces)), key=lambda i: len(pieces[i])), dict[int, str]()
    for start in tqdm(range(0, len(order), _ROWS), "filling gaps", unit="batch"):
        batch = order[start : start + _ROWS]
        rows = _filled(model, source.tokenizer.bos_token_id or 0, words, [pieces[i] for i in batch])
        filled |= zip(batch, source.tokenizer.batch_decode(rows), strict=True)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(config.output) as new:
        new.write_text("".join(filled[i] for i in range(len(pieces))), encoding="utf-8")


@torch.inference_mode()
def _filled(model: Any, bos: int, words: tuple[Tensor, Tensor], pieces: Sequence[list[int]]) -> list[list[int]]:
    """Return the tokens of each piece, with drawn ones in its gaps. `words`: as _words returns them."""
    starts, goes_on = words
    rows = [_Row(piece) for piece in pieces]
    longest = max(len(piece) + _LONGEST * piece.count(_GAP) for piece in pieces)
    cache = StaticCache(model.config, max_cache_len=1 + longest)
    ids = torch.full((len(rows), 1), bos)
    while not all(row.ended for row in rows):
        scores = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].float()
        first = drawn(scores.where(starts, -torch.inf).softmax(-1))[:, 0].tolist()
        more = drawn(scores.softmax(-1))[:, 0]
        new = [row.take(*each) for row, *each in zip(rows, first, more.tolist(), goes_on[more].tolist(), strict=True)]
        ids = torch.tensor(new)[:, None]
    return [row.written for row in rows]


def _words(tokenizer: Any, count: int) -> tuple[Bool[Tensor, "vocabulary"], Bool[Tensor, "vocabulary"]]:
    """Return which tokens begin a word with the space before it, and which go on with one."""
    names = [str(name).replace("▁", "Ġ") for name in tokenizer.convert_ids_to_tokens(list(range(count)))]
    starts, goes_on = (
        torch.tensor([re.fullmatch(pattern, name) is not None for name in names])
        for pattern in (r"Ġ[A-Za-z].*", r"[A-Za-z'-].*")
    )
    if not (starts.any() and goes_on.any()):
        raise RequestError("the model's tokenizer has no tokens that begin a word with the space before it")
    return starts, goes_on


if __name__ == "__main__":
    run(FillConfig, fill)
