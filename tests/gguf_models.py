"""Tiny models whose tokenizer can be written into a .gguf file, and where such files are."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_models
from tiny import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@contextmanager
def known_words() -> Generator[None]:
    """Let llama.cpp's converter take the tokenizer of tiny models for GPT-2's, which splits text as it does.

    It knows tokenizers by what they make of a certain text.
    """
    from conversion.base import TextModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")
        yield


def save_model(directory: Path, name: str = "llama-gqa", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a tiny model whose tokenizer has a merge: transformers reads no other from a .gguf file.

    `name`: of tests/tiny.py, or a type of model.
    """
    if "-" in name or name == "qwen2":
        save_tiny(directory, name, dtype, **options)
    else:
        tiny_models.save_tiny(name, directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for "th"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)} | {"th": 258}
    made = Tokenizer(models.BPE(vocab=words, merges=[("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def file_in(directory: Path) -> Path:
    """The only .gguf file there."""
    (path,) = directory.glob("*.gguf")
    return path
