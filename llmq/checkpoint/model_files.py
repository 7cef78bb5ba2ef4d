"""The files beside the weights of a model: tokenizer, templates and code are copied byte for byte."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """The files beside the weights: `config` is what config.json holds, `write` writes the others to a directory."""

    config: dict[str, Any]
    write: Callable[[Path], object]


def companions_of(source: ModelSource) -> Companions:
    """Return the companions of a model to quantize. Of a GGUF file, transformers writes the tokenizer."""
    if not source.is_gguf:
        companions = companions_in(source.directory)
        return replace(companions, config=_untied(companions.config)) if source.is_untied else companions
    config = source.config.to_dict() | {"architectures": [type(source.skeleton).__name__]}
    config.pop("_name_or_path", None)
    return Companions(config, source.tokenizer.save_pretrained)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = {key: config[key] | {"tie_word_embeddings": False} for key in ("text_config",) if key in config}
    return config | text | {"tie_word_embeddings": False}


def companions_in(directory: Path) -> Companions:
    """Return the companions of the model in a directory. This and `write` raise CheckpointError for links out of it."""
    return Companions(read_json(directory, "config.json"), lambda target: _copy(directory, target))


def _copy(source: Path, target: Path) -> None:
    """Copy tokenizer, templates and code. Raises CheckpointError for a link out of the model or an irregular file."""
    for name in [*COPIED, *(path.name for path in source.glob("*.py"))]:
        if (source / name).exists():
            shutil.copyfile(regular_file(source, name), target / name)
    templates = source / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        (target / TEMPLATES).mkdir()
        for path in templates.iterdir():
            shutil.copyfile(regular_file(templates, path.name, source), target / TEMPLATES / path.name)
