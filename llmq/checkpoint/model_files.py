"""The files beside the weights of a model: tokenizer, templates, code, licence are copied byte for byte."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmq.core.errors import CheckpointError
from llmq.models.model_source import ModelSource
from llmq.models.older_config import with_older_rope
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
# What is not copied of the other files: weights, the lists of their names, settings that a quantized model replaces.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz")
_REPLACED = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json", "params.json")


@dataclass(frozen=True)
class Companions:
    """The files beside the weights: `config` is what config.json holds, `write` writes the others to a directory."""

    config: dict[str, Any]
    write: Callable[[Path], object]


def companions_of(source: ModelSource) -> Companions:
    """Return the companions of a model to quantize. Of a GGUF file, transformers writes the tokenizer."""
    if not source.is_gguf:
        companions = companions_in(source.directory)
        config = companions.config | source.config_changes
        return replace(companions, config=_untied(config) if source.is_untied else config)
    config = source.config.to_dict() | {"architectures": [type(source.skeleton).__name__]}
    config.pop("_name_or_path", None)
    # A file whose tokenizer does not open has a model all the same.
    return Companions(with_older_rope(config), lambda target: source.tokenizer.save_pretrained(target))


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = {key: config[key] | {"tie_word_embeddings": False} for key in ("text_config",) if key in config}
    return config | text | {"tie_word_embeddings": False}


def companions_in(directory: Path) -> Companions:
    """Return the companions of the model in a directory. This and `write` raise CheckpointError for links out of it."""
    return Companions(read_json(directory, "config.json"), lambda target: _copy(directory, target))


def _copy(source: Path, target: Path) -> None:
    """Copy tokenizer, templates, code, licence and what else there is.

    Raises CheckpointError for a link out of the model or an irregular file, if a model is known to use its name.
    """
    known = {name for name in (*COPIED, *(path.name for path in source.glob("*.py"))) if (source / name).exists()}
    for name in sorted(known | set(_others(source))):
        shutil.copyfile(regular_file(source, name), target / name)
    templates = source / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        (target / TEMPLATES).mkdir()
        for path in templates.iterdir():
            shutil.copyfile(regular_file(templates, path.name, source), target / TEMPLATES / path.name)


def _others(source: Path) -> Iterator[str]:
    """Yield the names of regular files that may belong to the model: its own vocabulary, a licence, a model card."""
    for path in source.iterdir():
        is_ours = path.name in _REPLACED or path.name.startswith((".", "llmq_")) or path.name.endswith(".index.json")
        if path.suffix not in _WEIGHTS and not is_ours:
            with suppress(CheckpointError):  # a link to elsewhere, a pipe, a directory
                yield regular_file(source, path.name).name
