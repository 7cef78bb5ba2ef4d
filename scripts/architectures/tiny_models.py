"""Tiny random models of every decoder that transformers knows."""

from __future__ import annotations

import dataclasses
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from make_model import byte_tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.pytorch_utils import Conv1D

from architectures.sizes import BY_TYPE, COMMON, DEPTH

_STD = 0.08  # with 64 inputs a matrix makes its input two thirds as large
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")


def names() -> list[str]:
    """Return every model type with a decoder-only class, and the variants that sizes.py adds."""
    return [*CAUSAL, *(name for name in BY_TYPE if name not in CAUSAL)]


def tiny_config(name: str) -> Any:
    """Return the config of a tiny model: COMMON, then what sizes.py says of this type."""
    config_class = CONFIG_MAPPING[name.partition("@")[0]]
    return config_class(**_values(config_class, BY_TYPE.get(name, {})))


def _values(config_class: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return the values for those fields of a config class that COMMON or `own` name; sub-configs likewise."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in COMMON.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # every head has its own keys
        values["num_key_value_heads"] = values.get("num_attention_heads")
    values |= _kinds_of_layers(config_class, fields)
    for part, spec in config_class.sub_configs_defaults.items():
        of_part = own.get(part, {})
        if of_part is not None and part in fields:
            part_class = spec.config_class
            model_type = of_part.get("model_type", spec.model_type)
            if not issubclass(part_class, PreTrainedConfig):
                part_class = CONFIG_MAPPING[model_type]
            values[part] = _values(part_class, of_part) | {"model_type": model_type}
    return values | {name: value for name, value in own.items() if name not in values or not isinstance(value, dict)}


def _kinds_of_layers(config_class: Any, fields: set[str]) -> dict[str, Any]:
    """Return lists of layers in which every kind occurs that occurs in the default model, in the same order."""
    kinds: dict[str, list[str]] = {}
    try:
        default = config_class()
    except Exception:  # some classes have no default that is valid; sizes.py has their layers
        return {}
    for field in fields & set(_KINDS):
        if value := getattr(default, field, None):
            kinds[field] = list(dict.fromkeys(value))
    depth = max([DEPTH, *map(len, kinds.values())])
    values: dict[str, Any] = {field: list(islice(cycle(kind), depth)) for field, kind in kinds.items()}
    return values | ({"num_hidden_layers": depth} if depth > DEPTH and "num_hidden_layers" in fields else {})


def tiny_model(name: str, seed: int = 0) -> Any:
    """Return a random model in float32.

    Norms and biases are random, too, or a mistake in folding them would not show. Matrices are larger than transformers
    makes them: with 0.02 a block is almost the identity, in which mistakes would drown.
    """
    torch.manual_seed(seed)
    config = tiny_config(name)
    model = model_class(name).from_config(config, dtype=torch.float32).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for module in model.modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if _is_matrix(module, parameter) and parameter is not embedding:
                    parameter.normal_(std=_STD)
                elif parameter_name == "bias" or "norm" in type(module).__name__.lower():
                    parameter += 0.2 * torch.randn_like(parameter)
    return model


def _is_matrix(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether inputs are multiplied by this parameter. Convolutions and embeddings keep their weights."""
    if parameter.ndim == 3:
        return min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
    return parameter.ndim == 2 and isinstance(module, nn.Linear | Conv1D)


def model_class(name: str) -> Any:
    """Return the class that makes this model from its config, and loads it."""
    model_type, _, variant = name.partition("@")
    return AutoModelForCausalLM if model_type in CAUSAL and variant != "image" else AutoModelForImageTextToText


def save_tiny(name: str, directory: Path) -> Any:
    """Save a tiny model with a tokenizer of one token a byte; return the model."""
    model = tiny_model(name)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


def has_experts(model: Any) -> bool:
    """Return whether a model routes tokens to some of several experts."""
    return any("expert" in name or "Expert" in type(module).__name__ for name, module in model.named_modules())


def text(seed: int) -> str:
    """Return random words, enough for the calibration."""
    letters = torch.randint(97, 123, (400, 5), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join("".join(map(chr, word)) for word in letters)


def some_tokens(source: Path) -> Tensor:
    """Return two texts of 80 tokens that are not in the calibration text.

    With more than 64 tokens, linears multiply in float32 whatever the machine.
    """
    ids = AutoTokenizer.from_pretrained(source)(text(1), return_tensors="pt")["input_ids"]
    return ids[0, :160].view(2, 80)
