"""A packed checkpoint becomes a transformers model whose quantized linears stay packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llmq.config import DEVICES
from llmq.errors import CheckpointError, RequestError
from llmq.formats import FORMATS
from llmq.linear import PackedLinear
from llmq.source import ModelSource, build_skeleton, move_buffers, tied_aliases
from llmq.tensor_files import SafetensorsDirectory
from llmq.weight import QuantizedWeight


class Checkpoint:
    """A quantized checkpoint on disk: which linears are packed, how, and what else it holds.

    Raises CheckpointError if the directory is not one, or holds a quantization llmq does not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory} holds no readable config.json ({type(error).__name__})") from None
        quantization = self.config.get("quantization_config") if isinstance(self.config, dict) else None
        quantization = quantization if isinstance(quantization, dict) else {}
        method = quantization.get("quant_method")
        if method not in FORMATS:
            raise CheckpointError(f"{directory}: quantization method {method!r} is not one of {', '.join(FORMATS)}")
        self.format = FORMATS[method]
        self.scheme = self.format.scheme_of(quantization)
        self.files = SafetensorsDirectory(directory)
        suffix = f".{self.format.PARTS[0]}"
        self.linears = sorted(name.removesuffix(suffix) for name in self.files.names() if name.endswith(suffix))

    def weight(self, name: str) -> QuantizedWeight:
        """One decoded linear."""
        parts = (f"{name}.{part}" for part in self.format.PARTS)
        present = self.files.names()
        return self.format.decode(name, {part: self.files.read(part) for part in parts if part in present}, self.scheme)

    def packed_names(self) -> set[str]:
        return {f"{name}.{part}" for name in self.linears for part in self.format.PARTS}


@torch.no_grad()
def load(directory: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> Any:
    """The checkpoint as a transformers model, ready for inference: `.generate` works.

    Args:
        device: auto (cuda when present), cpu, cuda or cuda:N.
        dtype: of activations and unquantized weights; by default float32 on a CPU and the checkpoint's own on a GPU.

    Raises CheckpointError for anything missing, left over or inconsistent: a model with a single wrong tensor would
    still talk, only worse.
    """
    if device.partition(":")[0] not in DEVICES:
        raise RequestError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    cuda = torch.cuda.is_available()
    target = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    checkpoint = Checkpoint(Path(directory))
    config = _model_config(checkpoint.directory)
    delattr(config, "quantization_config")  # or transformers would look for the format's own package
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch_dtype(config.dtype)
    model = build_skeleton(config)
    _place_packed(model, checkpoint, target)
    _place_rest(model, checkpoint, target, dtype)
    model.config.dtype = dtype
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def torch_dtype(name: Any) -> torch.dtype:
    """What config.json calls a dtype; float16 where it says nothing."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) else torch.float16


def load_any(spec: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a packed checkpoint or of an original model, whichever `spec` is."""
    path = Path(spec).expanduser()
    if (path / "config.json").exists() and '"quantization_config"' in (path / "config.json").read_text(
        encoding="utf-8"
    ):
        return load(path, device=str(device), dtype=dtype), AutoTokenizer.from_pretrained(path)
    source = ModelSource(spec, trust_remote_code)
    return source.load_all(device, dtype), source.tokenizer


def _model_config(directory: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # config classes check their own fields and raise what they like
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(f"{directory}: config.json describes no model transformers knows: {reason}") from None


def _place_packed(model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    for name in checkpoint.linears:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{checkpoint.directory}: {name} is packed, but the model has no such linear")
        weight = checkpoint.weight(name)
        if tuple(weight.q.shape) != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{name}: packed as {tuple(weight.q.shape)}, the model wants {tuple(linear.weight.shape)}"
            )
        bias = None if linear.bias is None else checkpoint.files.read(f"{name}.bias")
        if bias is not None and (tuple(bias.shape) != (linear.out_features,) or not bias.is_floating_point()):
            raise CheckpointError(
                f"{name}.bias: {bias.dtype} {tuple(bias.shape)} fits no {linear.out_features} outputs"
            )
        model.set_submodule(name, PackedLinear(weight, bias).to(device))


def _place_rest(model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    aliases = tied_aliases(model)
    placed = {f"{name}.{part}" for name in checkpoint.linears for part in model.get_submodule(name).state_dict()}
    # Parameters, and the few buffers that are stored: Gemma 4 scales each block by one.
    wanted = set(model.state_dict()) - aliases - placed
    here = checkpoint.files.names()
    biases = {name for name in placed if name.endswith(".bias")}
    left_over = here - wanted - aliases - checkpoint.packed_names() - biases
    if wanted - here or left_over:
        what = (
            f"lacks {sorted(wanted - here)[0]}" if wanted - here else f"holds an unknown tensor {sorted(left_over)[0]}"
        )
        raise CheckpointError(f"{checkpoint.directory} {what}; it does not belong to this model")
    tensors: dict[str, Tensor] = {}
    for name in sorted(wanted):
        tensor = checkpoint.files.read(name)
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint.directory} does not fit its config.json: {reason}") from None
    model.tie_weights()
    move_buffers(model, device)
