"""What travels with the weights of a model: its configuration, tokenizer, templates and code, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.models.model_source import ModelSource
from llmq.models.untrusted_files import read_json, regular_file

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Companions:
    """The configuration of a model, and what puts the rest into another directory."""

    config: dict[str, Any]
    write: Callable[[Path], object]


def companions_of(source: ModelSource) -> Companions:
    """Those of a model to quantize. A GGUF file holds its tokenizer inside: transformers writes it."""
    if not source.is_gguf:
        return companions_in(source.directory)
    config = source.config.to_dict() | {"architectures": [type(source.skeleton).__name__]}
    config.pop("_name_or_path", None)
    return Companions(config, source.tokenizer.save_pretrained)


def companions_in(directory: Path) -> Companions:
    """Those of a directory. Raises CheckpointError, also when they are written, for links out of it."""
    return Companions(read_json(directory, "config.json"), lambda target: _copy(directory, target))


def _copy(source: Path, target: Path) -> None:
    for name in [*COPIED, *(path.name for path in source.glob("*.py"))]:
        if (source / name).exists():
            shutil.copyfile(regular_file(source, name), target / name)
    templates = source / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        (target / TEMPLATES).mkdir()
        for path in templates.iterdir():
            shutil.copyfile(regular_file(templates, path.name, source), target / TEMPLATES / path.name)
