"""Where the tensors of a packed checkpoint belong in a model: all of them are compared before any is put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from llmq.checkpoint.reader import CONFIG, Checkpoint
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.model_source import tied_aliases

LinearMaker: TypeAlias = Callable[[str, QuantizedWeight, "Tensor | None"], nn.Module]
"""From the name of a packed linear, its weight and its bias to the module that stands for it."""


def check_fit(model: Any, checkpoint: Checkpoint) -> set[str]:
    """The names of the tensors a model wants beside packed weights, if the files hold these and no others.

    Raises CheckpointError otherwise. Packed weights themselves are compared as they are decoded: see `fitting`.
    """
    for name in checkpoint.linears:
        packed_target(model, checkpoint, name)
    packed, aliases = {f"{name}.weight" for name in checkpoint.linears}, tied_aliases(model)
    # Parameters, and the few buffers that are stored: Gemma 4 scales each block by one.
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    floats = {name: tensor.is_floating_point() for name, tensor in state.items()}
    wanted, here = shapes.keys() - aliases - packed, set(checkpoint.other_names)
    unknown = [name for name in sorted(here - wanted - aliases) if not harmless(checkpoint, model, name)]
    if wanted - here or unknown:
        what = f"lacks {sorted(wanted - here)[0]}" if wanted - here else f"holds an unknown tensor {unknown[0]}"
        raise CheckpointError(f"{checkpoint.directory} {what}; it does not belong to this model")
    for name in sorted(wanted):
        found = checkpoint.files.shape(name)
        if found != shapes[name]:
            what = f"{name} is {found}, the model wants {shapes[name]}"
            raise CheckpointError(f"{checkpoint.directory} does not fit its {CONFIG}: {what}")
        if checkpoint.files.is_float(name) != floats[name]:
            kind = "floating-point numbers" if floats[name] else "integers"
            raise CheckpointError(f"{checkpoint.directory}: {name} does not hold {kind}, which the model wants")
    _check_aliases(model, checkpoint, here & aliases)
    return wanted


def _check_aliases(model: Any, checkpoint: Checkpoint, stored: set[str]) -> None:
    """Refuse a tensor that config.json calls a repetition of another, but which is not: readers disagree on which."""
    repeats = getattr(model, "all_tied_weights_keys", {})
    for name in sorted(stored & repeats.keys()):
        if not torch.equal(checkpoint.files.read(name), checkpoint.files.read(repeats[name])):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} differs from {repeats[name]}, to which {CONFIG} ties it"
            )


def packed_target(model: Any, checkpoint: Checkpoint, name: str) -> nn.Linear:
    """The linear of the model that a packed weight is meant for. Raises CheckpointError if it has none."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{checkpoint.directory}: {name} is packed, but the model has no such linear")
    if f"{name}.weight" in tied_aliases(model):
        raise CheckpointError(f"{checkpoint.directory}: {name} is packed, but the model ties it to its embeddings")
    return linear


def harmless(checkpoint: Checkpoint, model: Any, name: str) -> bool:
    """Whether a tensor is left over but changes nothing.

    AutoGPTQ stores biases of zeros for linears without one, and rotary frequencies, which are computed.
    """
    linear, _, leaf = name.rpartition(".")
    if leaf == "inv_freq":
        return name not in model.state_dict()
    if leaf != "bias" or linear not in checkpoint.schemes:
        return False
    return getattr(model.get_submodule(linear), "bias", None) is None and not checkpoint.files.read(name).any()


def place_packed(model: Any, checkpoint: Checkpoint, make_linear: LinearMaker) -> None:
    """Replace every linear whose weight is packed. Raises CheckpointError for a weight or bias that does not fit."""
    for name in checkpoint.linears:
        weight, bias = fitting(model, checkpoint, name)
        model.set_submodule(name, make_linear(name, weight, bias))


def fitting(model: Any, checkpoint: Checkpoint, name: str) -> tuple[QuantizedWeight, Tensor | None]:
    """The packed weight and the bias of a linear. Raises CheckpointError if one does not fit the model's."""
    linear = packed_target(model, checkpoint, name)
    weight = checkpoint.weight(name)
    if tuple(weight.q.shape) != (linear.out_features, linear.in_features):
        wanted = (linear.out_features, linear.in_features)
        raise CheckpointError(f"{name}: packed as {tuple(weight.q.shape)}, the model wants {wanted}")
    bias = None if linear.bias is None else checkpoint.read(f"{name}.bias")
    if bias is not None and (tuple(bias.shape) != (linear.out_features,) or not bias.is_floating_point()):
        raise CheckpointError(f"{name}.bias: {bias.dtype} {tuple(bias.shape)} fits no {linear.out_features} outputs")
    return weight, bias
