"""Which stored tensors are a model's: tied ones are stored once, and some have no place in the model."""

import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.safetensors_files import TensorFiles


def tied_names(model: Any) -> dict[str, str]:
    """Return the name of the tensor that an alias repeats: lm_head repeats the embeddings in many models."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def untie_own(model: Any, files: TensorFiles) -> bool:
    """Return whether the files hold a tensor of its own for an alias. Then set the model's config to untied.

    transformers and vLLM use such a tensor, although config.json says that there is none. The caller must build the
    model anew.
    """
    both = [pair for pair in tied_names(model).items() if files.names().issuperset(pair)]
    if not any(_differ(*map(files.read, pair)) for pair in both):
        return False
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _differ(a: Tensor, b: Tensor) -> bool:
    if not (a.is_floating_point() and b.is_floating_point()):  # the words of a packed linear, as MLX calls them
        return False
    return a.shape != b.shape or not torch.equal(a, b if a.dtype == b.dtype else b.to(a.dtype))


def has_no_place(model: Any, name: str) -> bool:
    """Return whether no part of the model could use a tensor of this name, as it is now or under other settings.

    True for the head of a classifier, blocks that predict further tokens, towers for pictures. False for a tensor in a
    block, or of a module without children: the model would compute something else with it.
    """
    module, is_inside = model, False
    for child in name.split("."):
        inner = dict(module.named_children()).get(child)
        if inner is None:
            break
        is_inside = is_inside or isinstance(module, nn.ModuleList)
        module = inner
    else:  # a module has this name, and a module is no tensor
        return False
    if isinstance(module, nn.ModuleList):  # a block too many is a mistake, unless it predicts further tokens
        return _is_ignored(model, name) or bool(getattr(model.config, "num_nextn_predict_layers", 0))
    return not is_inside and any(True for _ in module.children())


def is_computed(model: Any, name: str) -> bool:
    """Return whether a model computes a tensor of this name itself: rotary frequencies, masks."""
    if name.endswith(("inv_freq", "masked_bias")):
        return True
    with suppress(AttributeError):
        return isinstance(model.get_buffer(name), Tensor)
    return _is_ignored(model, name) and not has_no_place(model, name)


def _is_ignored(model: Any, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
