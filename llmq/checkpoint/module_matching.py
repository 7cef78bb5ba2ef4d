"""Match the tensors of a packed checkpoint with the modules of a model, and put packed linears into the model."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from llmq.checkpoint.reader import CONFIG, CPU, Checkpoint
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.stored_names import has_no_place, is_computed, tied_names

LinearMaker: TypeAlias = Callable[[str, QuantizedWeight, "Tensor | None"], nn.Module]
"""Takes the name of a packed linear, its weight and its bias; returns the module that replaces the linear."""


def check_fit(model: Any, checkpoint: Checkpoint) -> set[str]:
    """Return the names of all tensors that the model needs beside the packed weights.

    Raises CheckpointError unless the files hold these, in the right shapes and kinds of numbers, and no other that the
    model could use. Shapes of packed weights are compared later, when the weights are decoded: see `read_linear`.
    """
    for name in checkpoint.linears:
        packed_target(model, checkpoint, name)
    packed, aliases = {f"{name}.weight" for name in checkpoint.linears}, tied_names(model).keys()
    # Parameters, and the few buffers that are stored: Gemma 4 scales each block by one.
    state = model.state_dict()
    wanted, stored = state.keys() - aliases - packed, set(checkpoint.other_names)
    unknown = [name for name in sorted(stored - wanted - aliases) if not is_harmless(checkpoint, model, name)]
    unknown = [name for name in unknown if not has_no_place(model, name)]
    if wanted - stored or unknown:
        fault = f"lacks {sorted(wanted - stored)[0]}" if wanted - stored else f"holds an unknown tensor {unknown[0]}"
        raise CheckpointError(f"{checkpoint.directory} {fault}; it does not belong to this model")
    for name in sorted(wanted):
        shape, wanted_shape = checkpoint.files.shape(name), tuple(state[name].shape)
        if shape != wanted_shape:
            fault = f"{name} is {shape}, the model wants {wanted_shape}"
            raise CheckpointError(f"{checkpoint.directory} does not fit its {CONFIG}: {fault}")
        if checkpoint.files.is_float(name) != state[name].is_floating_point():
            numbers = "floating-point numbers" if state[name].is_floating_point() else "integers"
            raise CheckpointError(f"{checkpoint.directory}: {name} does not hold {numbers}, which the model wants")
    return wanted


def packed_target(model: Any, checkpoint: Checkpoint, name: str) -> nn.Linear:
    """Return the linear of the model that has the name of a packed weight. Raises CheckpointError if there is none."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{checkpoint.directory}: {name} is packed, but the model has no such linear")
    if f"{name}.weight" in tied_names(model):
        raise CheckpointError(f"{checkpoint.directory}: {name} is packed, but the model ties it to its embeddings")
    return linear


def is_harmless(checkpoint: Checkpoint, model: Any, name: str) -> bool:
    """Return whether the model does not need a tensor and computes the same without it.

    AutoGPTQ stores biases of zeros for linears without a bias, and rotary frequencies, which the model computes.
    """
    linear, _, leaf = name.rpartition(".")
    if is_computed(model, name):
        return name not in model.state_dict()
    if leaf != "bias" or linear not in checkpoint.schemes:
        return False
    return getattr(model.get_submodule(linear), "bias", None) is None and not checkpoint.files.read(name).any()


def replace_linears(
    model: Any, checkpoint: Checkpoint, make_linear: LinearMaker, device_of: Callable[[str], torch.device]
) -> None:
    """Replace every linear of the model that is packed. Raises CheckpointError if a weight or bias does not fit.

    `device_of` says where the linear of this name goes. Its weight is decoded there.
    """
    for name in checkpoint.linears:
        weight, bias = read_linear(model, checkpoint, name, device_of(name))
        model.set_submodule(name, make_linear(name, weight, bias))


def read_linear(
    model: Any, checkpoint: Checkpoint, name: str, device: torch.device = CPU
) -> tuple[QuantizedWeight, Tensor | None]:
    """Return the packed weight and the bias of a linear. Raises CheckpointError if one does not fit the model."""
    linear = packed_target(model, checkpoint, name)
    weight = checkpoint.weight(name, device=device)
    if tuple(weight.q.shape) != (linear.out_features, linear.in_features):
        wanted = (linear.out_features, linear.in_features)
        raise CheckpointError(f"{name}: packed as {tuple(weight.q.shape)}, the model wants {wanted}")
    bias = None if getattr(linear, "bias", None) is None else checkpoint.read(f"{name}.bias").to(device)
    if bias is not None and (tuple(bias.shape) != (linear.out_features,) or not bias.is_floating_point()):
        raise CheckpointError(f"{name}.bias: {bias.dtype} {tuple(bias.shape)} fits no {linear.out_features} outputs")
    return weight, bias
