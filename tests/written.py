"""A model with all the files that travel with one, and directories that the writer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import save_tiny
from torch import Tensor

from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.models.model_source import ModelSource

KILOBYTE = 256  # float32 numbers


def complete_source(directory: Path) -> ModelSource:
    """A source with all the files that travel with a model, laid out as no JSON writer would."""
    save_tiny(directory)
    (directory / "generation_config.json").write_bytes(b'{"temperature":0.70,\r\n\t"top_k" : 5}')
    (directory / "special_tokens_map.json").write_bytes(b'{ "eos_token":"<eos>" }')
    (directory / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    (directory / "modeling_own.py").write_bytes(b"x = 1\r\n")
    for name in ("README.md", "LICENSE", "own.tiktoken", "training_args.bin", "adapter_config.json", ".gitattributes"):
        (directory / name).write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_bytes(b"{{ tools }}")
    return ModelSource(str(directory))


def numbers(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(
    directory: Path,
    source: ModelSource,
    tensors: dict[str, Tensor],
    overwrite: bool = False,
    shard_bytes: int = 10**9,
    **options: Any,
) -> None:
    """Write a checkpoint of these tensors; `options` go to `finish`."""
    with Writer(directory, overwrite, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.put({name: tensor})
        options = {"quantization_config": {"quant_method": "ours"}} | options
        writer.finish(companions_of(source), torch.float16, **options)
