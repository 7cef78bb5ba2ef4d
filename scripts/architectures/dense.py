"""The dense model that holds the dequantized weights of a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from llmq.checkpoint.reader import Checkpoint
from llmq.models.experts import layouts
from llmq.models.model_source import build_skeleton


def dequantized(model: Any, room: Path, output: Path) -> Any:
    """Return a model, whose files are in `room`, with the weights that the checkpoint in `output` stands for.

    They are put into the files, under their names there, so that transformers maps names as it always does. Weights
    that the files hold in another way, such as all experts in one tensor, are put into the model.
    """
    checkpoint = Checkpoint(output)
    weights = {name: checkpoint.weight(name).dequantize(torch.float32) for name in checkpoint.linears}
    directory = room / "dense"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(room / "source", directory)
    tensors = load_file(directory / "model.safetensors")
    if any(type(module) is Conv1D for module in model.modules()):  # whose weights lie transposed
        weights = {name: weight.T.contiguous() for name, weight in weights.items()}
    stored = {f"{name}.weight": weight for name, weight in weights.items() if f"{name}.weight" in tensors}
    save_file(tensors | stored, directory / "model.safetensors", metadata={"format": "pt"})
    dense = type(model).from_pretrained(directory, dtype=torch.float32).eval()
    skeleton = build_skeleton(model.config)
    places = _places(dense, skeleton)
    with torch.no_grad():
        for linear, name in checkpoint.for_model(skeleton).model_files.linears.items():
            if f"{name}.weight" not in stored:
                place = places.get(linear)
                (dense.get_parameter(f"{linear}.weight") if place is None else place).copy_(weights[name])
    return dense


def _places(dense: Any, skeleton: Any) -> dict[str, torch.Tensor]:
    """Return where the weight of each expert's linear lies in a model of transformers, by its name in the skeleton."""
    return {
        f"{module}.{expert}.{inner}".removesuffix(".weight"): place.of(
            dense.get_parameter(f"{module}.{place.parameter}"), expert, layout.experts
        )
        for module, layout in layouts(skeleton).items()
        for expert in range(layout.experts)
        for inner, place in layout.places.items()
        if inner.endswith(".weight")
    }


def round_experts(dense: Any, model: Any) -> bool:
    """Round the experts of a dense model to float16, as transformers unpacks them; return whether it has such ones.

    The logits change by 1e-4 to 1e-3, or by more where a router is almost undecided. With these they are equal again.
    """
    in_half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
    for name in in_half:
        dense.get_parameter(name).data = dense.get_parameter(name).half()
    return bool(in_half)
