"""Experts as linears while transformers opens or saves a model: it knows only tensors that hold all experts of a block.

opening:  the linears leave the model ──► transformers loads the other tensors ──► they come back and are filled
saving:   tensors in float become those of all experts again, and transformers stores them in its own way
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.reader import Checkpoint
from llmq.models.experts import Layout, expert_of, layouts, linears_of
from llmq.models.model_files import ModelFiles

_RESERVED = "llmq_reserved"


def reserve(module: nn.Module, nbytes: int) -> None:
    """Give a module a buffer of so many bytes, so that device_map="auto" counts what will take its place."""
    module.register_buffer(_RESERVED, torch.empty(nbytes, dtype=torch.uint8, device="meta"), persistent=False)


def reserved_on(module: nn.Module) -> torch.device:
    """Return the device that the buffer went to."""
    return module.get_buffer(_RESERVED).device


def take_experts(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Remove the linears of all experts from a model, and return them by the name of their expert."""
    taken: dict[str, nn.Module] = {}
    schemes, in_float = checkpoint.schemes, 8 * model.dtype.itemsize
    for name, layout in layouts(model).items():
        module, bits = model.get_submodule(name), 0
        for expert in range(layout.experts):
            linears = taken[f"{name}.{expert}"] = expert_of(module, expert)
            delattr(module, str(expert))
            for inner in linears_of(layout):
                scheme = schemes.get(f"{name}.{expert}.{inner}")
                width = in_float if scheme is None else scheme.bits
                bits += width * linears.get_submodule(inner).get_parameter("weight").numel()
        reserve(module, bits // 8)
    return taken


def return_experts(model: Any, taken: dict[str, nn.Module]) -> dict[str, torch.device]:
    """Put the linears back, without numbers, and return the device of each expert."""
    devices: dict[str, torch.device] = {}
    for name, linears in taken.items():
        inside, _, expert = name.rpartition(".")
        module = model.get_submodule(inside)
        devices[name] = reserved_on(module)
        module.add_module(expert, linears)
    for name in layouts(model):
        delattr(model.get_submodule(name), _RESERVED)
    return devices


def load_experts(model: Any, files: ModelFiles, names: set[str], devices: dict[str, torch.device]) -> None:
    """Read these tensors of experts that stay in float."""
    tensors: dict[str, Tensor] = {}
    for name in sorted(names, key=lambda name: files.stored_names(name)[0]):
        tensors[name] = files.read(name).to(devices[expert_in(name)], model.dtype)
    files.forget()
    model.load_state_dict(tensors, strict=False, assign=True)


def expert_in(name: str) -> str:
    """Return the name of the expert that a tensor would be in: `experts.3` for `experts.3.up_proj.bias`."""
    return ".".join(name.split(".")[:-2])


def merge_experts(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace the tensors of experts in float in a state by those that hold all experts."""
    for name, layout in layouts(model).items():
        for parameter in {place.parameter for place in layout.places.values()}:
            inside = [inner for inner, place in layout.places.items() if place.parameter == parameter]
            experts = [{inner: f"{name}.{expert}.{inner}" for inner in inside} for expert in range(layout.experts)]
            if all(part in state for parts in experts for part in parts.values()):
                tensors = [{inner: state.pop(part) for inner, part in parts.items()} for parts in experts]
                state[f"{name}.{parameter}"] = _merged(layout, tensors)


def _merged(layout: Layout, experts: list[dict[str, Tensor]]) -> Tensor:
    """Return the tensor of all experts that holds tensors of each, which are given by their names inside one."""
    places = [layout.places[inner] for inner in experts[0]]
    outputs, inputs = sum(map(len, experts[0].values())), next(iter(experts[0].values())).shape[1:]
    shape = [*inputs, outputs] if places[0].turned else [outputs, *inputs]
    shape = [layout.experts * shape[0], *shape[1:]] if places[0].is_flat else [layout.experts, *shape]
    whole = next(iter(experts[0].values())).new_empty(shape)
    for expert, tensors in enumerate(experts):
        for place, tensor in zip(places, tensors.values(), strict=True):
            place.of(whole, expert, layout.experts).copy_(tensor)
    return whole
