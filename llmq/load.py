"""A packed checkpoint becomes a transformers model whose quantized linears stay packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmq.checkpoint import CONFIG, Checkpoint, is_packed
from llmq.device import pick_device
from llmq.errors import CheckpointError
from llmq.hub import locate
from llmq.linear import PackedLinear
from llmq.merge import merge_linears
from llmq.source import ModelSource, build_skeleton, move_buffers, read_generation_config, tied_aliases
from llmq.weight import QuantizedWeight

LinearMaker: TypeAlias = Callable[[str, QuantizedWeight, "Tensor | None"], nn.Module]
"""From the name of a packed linear, its weight and its bias to the module that stands for it."""


def packed_linear(name: str, weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:  # noqa: ARG001
    """What inference wants."""
    return PackedLinear.from_codes(weight, bias)


@torch.no_grad()
def load(
    directory: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    merge: bool = False,
    make_linear: LinearMaker = packed_linear,
) -> Any:
    """The checkpoint as a transformers model, ready for inference: `.generate` works.

    Args:
        device: auto (cuda when present), cpu, cuda or cuda:N.
        dtype: of activations and unquantized weights; by default float32 on a CPU and the checkpoint's own on a GPU.
        trust_remote_code: run modelling code that ships with the checkpoint.
        merge: run q, k, v and gate, up as one matmul each, where their bits and groups agree: fewer, larger launches.
        make_linear: what makes the module that stands for a packed weight.

    Raises CheckpointError for anything missing, left over or inconsistent: a model with a single wrong tensor would
    still talk, only worse.
    """
    target = pick_device(device)
    checkpoint = Checkpoint(Path(directory))
    config = model_config(checkpoint, trust_remote_code)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else _torch_dtype(config.dtype)
    model = build_skeleton(config, trust_remote_code)
    _place_packed(model, checkpoint, target, make_linear)
    _place_rest(model, checkpoint, target, dtype)
    model.config.dtype = dtype
    read_generation_config(model, checkpoint.directory)
    if merge:
        merge_linears(model)
    return model.eval()


def load_any(spec: str, device: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a packed checkpoint or of an original model, whichever `spec` is.

    float32 on a CPU, the dtype of the files on a GPU.
    """
    path = locate(spec, trust_remote_code)
    if is_packed(path):
        return load(path, device, trust_remote_code=trust_remote_code), _tokenizer(path, trust_remote_code)
    source, target = ModelSource(spec, trust_remote_code), pick_device(device)
    return source.load_all(target, torch.float32 if target.type == "cpu" else source.dtype), source.tokenizer


def _torch_dtype(name: Any) -> torch.dtype:
    """What config.json calls a dtype; float16 where it says nothing."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) else torch.float16


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen tokenizer classes, each with its own way to fail
        raise CheckpointError(f"{path} holds no readable tokenizer ({type(error).__name__})") from None


def model_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The model's configuration without its quantization, for which transformers would want the format's own package.

    Raises CheckpointError if it describes no model, or one that cannot be what the files hold.
    """
    directory = checkpoint.directory
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        # Before anything is built: modules and buffers take as much memory as a config of strangers asks for.
        depth = config.get_text_config().num_hidden_layers
        if not 0 < depth <= len(checkpoint.files.names()):
            raise ValueError(f"{depth} blocks, of {len(checkpoint.files.names())} tensors")
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes check their own fields and raise what they like
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
        raise CheckpointError(f"{directory}: {CONFIG} describes no model transformers knows: {reason}") from None
    stored = sum(checkpoint.files.nbytes(name) for name in checkpoint.files.names())
    largest = max(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if largest > 4 * stored:  # two bits are the least that a number takes
        raise CheckpointError(
            f"{directory}: {CONFIG} wants a tensor of {largest} numbers; all files have {stored} bytes"
        )
    return config


def _place_packed(model: Any, checkpoint: Checkpoint, device: torch.device, make_linear: LinearMaker) -> None:
    for name in checkpoint.linears:
        linear = packed_target(model, checkpoint, name)
        weight = checkpoint.weight(name)
        if tuple(weight.q.shape) != (linear.out_features, linear.in_features):
            wanted = (linear.out_features, linear.in_features)
            raise CheckpointError(f"{name}: packed as {tuple(weight.q.shape)}, the model wants {wanted}")
        bias = None if linear.bias is None else checkpoint.files.read(f"{name}.bias")
        if bias is not None and (tuple(bias.shape) != (linear.out_features,) or not bias.is_floating_point()):
            raise CheckpointError(
                f"{name}.bias: {bias.dtype} {tuple(bias.shape)} fits no {linear.out_features} outputs"
            )
        model.set_submodule(name, make_linear(name, weight, bias).to(device))


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


def _place_rest(model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    aliases = tied_aliases(model)
    placed = {f"{name}.{part}" for name in checkpoint.linears for part in model.get_submodule(name).state_dict()}
    # Parameters, and the few buffers that are stored: Gemma 4 scales each block by one.
    wanted = set(model.state_dict()) - aliases - placed
    here = set(checkpoint.other_names)
    biases = {name for name in placed if name.endswith(".bias")}
    unknown = [name for name in sorted(here - wanted - aliases - biases) if not _harmless(checkpoint, name)]
    if wanted - here or unknown:
        what = f"lacks {sorted(wanted - here)[0]}" if wanted - here else f"holds an unknown tensor {unknown[0]}"
        raise CheckpointError(f"{checkpoint.directory} {what}; it does not belong to this model")
    tensors: dict[str, Tensor] = {}
    for name in sorted(wanted):
        tensor = checkpoint.files.read(name)
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint.directory} does not fit its {CONFIG}: {reason}") from None
    model.tie_weights()
    move_buffers(model, device)


def _harmless(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor that the model does not know changes nothing: AutoGPTQ stores biases of zeros for linears
    without one, and rotary frequencies, which are computed."""
    linear, _, leaf = name.rpartition(".")
    if leaf == "inv_freq":
        return True
    return leaf == "bias" and linear in checkpoint.schemes and not bool(checkpoint.files.read(name).any())
