"""A packed checkpoint becomes a transformers model whose quantized linears stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmq.bounds import bounded, refuse_absurd
from llmq.checkpoint import CONFIG, Checkpoint, is_packed
from llmq.device import pick_device
from llmq.errors import CheckpointError
from llmq.hf import attach
from llmq.hub import locate
from llmq.linear import PackedLinear
from llmq.merge import merge_linears
from llmq.place import LinearMaker, check_fit, place_packed
from llmq.source import ModelSource, build_skeleton, move_buffers, read_generation_config
from llmq.weight import QuantizedWeight

_SPARE = 1 << 28  # bytes of buffers that a model may have beside what its files hold: masks, rotary frequencies


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
    config, runs = _tried_config(checkpoint, trust_remote_code)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else _torch_dtype(config.dtype)
    model = build_skeleton(config, trust_remote_code)
    wanted = check_fit(model, checkpoint)
    place_packed(model, checkpoint, lambda *parts: make_linear(*parts).to(target))
    placed = {f"{name}.bias" for name in checkpoint.linears}
    _place_rest(model, checkpoint, sorted(wanted - placed), target, dtype)
    model.config.dtype = dtype
    attach(model, checkpoint)
    read_generation_config(model, checkpoint.directory)
    if merge:
        merge_linears(model)
    # Code that looks at numbers, as mixtures of experts do, cannot be tried without them.
    reason = None if runs else _failure(model.eval(), target)
    if reason is not None:
        raise CheckpointError(f"{checkpoint.directory}: {CONFIG} describes a model that cannot run: {reason}")
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
    return _tried_config(checkpoint, trust_remote_code)[0]


def _tried_config(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, bool]:
    """`model_config`, and whether a model of it has been seen to run, on the meta device."""
    directory, files = checkpoint.directory, checkpoint.files
    stored = sum(files.nbytes(name) for name in files.names())
    try:
        refuse_absurd(checkpoint.config)
        if "configuration_files" in checkpoint.config:  # transformers would open these instead
            raise ValueError("it points to other configuration files")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        depth = config.get_text_config().num_hidden_layers
        if not 0 < depth <= len(files.names()):
            raise ValueError(f"{depth} blocks, of {len(files.names())} tensors")
        # Not for a checkpoint to say: which code computes attention (some names are fetched from the hub) and what a
        # model returns.
        config.output_attentions, config.return_dict = False, True
        config._attn_implementation = config._experts_implementation = None
        # Two bits are the least that a number takes.
        with torch.device("meta"), bounded(len(files.names()), 4 * stored):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes check their own fields and raise what they like
        raise CheckpointError(
            f"{directory}: {CONFIG} describes no model transformers knows: {_first_line(error)}"
        ) from None
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > 4 * stored + _SPARE:
        raise CheckpointError(f"{directory}: {CONFIG} wants {buffers} bytes of buffers; all files have {stored}")
    return config, _failure(model.eval(), torch.device("meta")) is None


def _failure(model: Any, device: torch.device) -> str | None:
    """Why the model cannot run, as some settings only show then; None if it can."""
    try:
        with torch.no_grad(), device:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits.size()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def _place_rest(model: Any, checkpoint: Checkpoint, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = checkpoint.files.read(name)
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    move_buffers(model, device)
