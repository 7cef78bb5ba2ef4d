"""Loads a packed checkpoint as a transformers model. Its quantized linears stay packed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmq.checkpoint.module_matching import LinearMaker, check_fit, replace_linears
from llmq.checkpoint.reader import CONFIG, Checkpoint, is_packed
from llmq.core.device import pick_device
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.settings import TOKEN
from llmq.models.gguf_file import parsed_once
from llmq.models.gguf_header import read_header
from llmq.models.locate import gguf_in, locate
from llmq.models.model_source import ModelSource, build_skeleton, move_buffers, read_generation_config
from llmq.runtime.fused_siblings import merge_linears
from llmq.runtime.model_config import checked_config, failure
from llmq.runtime.packed_experts import group_experts
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.transformers_plugin import attach


@torch.no_grad()
def load(
    directory: str | Path,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    merge: bool = False,
    make_linear: LinearMaker = lambda _, weight, bias: PackedLinear.from_codes(weight, bias),
) -> Any:
    """Load a checkpoint as a transformers model, ready for inference: `.generate` works.

    Args:
        directory: a packed checkpoint; or what `--model` takes: a hub id, `demo`, a .gguf file. If that is an original
            model, nothing in it is packed.
        device: auto (cuda when present), cpu, cuda or cuda:N.
        dtype: dtype of activations and unquantized weights, such as torch.bfloat16 or "bfloat16". Default: float32 on
            a CPU; on a GPU the checkpoint's own, but bfloat16 if that is float32, which the kernels do not take. On a
            CPU without a C compiler 4-bit layers multiply up to 64 tokens in bfloat16, which is much faster; with
            torch.float32 they multiply in float32, too.
        trust_remote_code: run modelling code that ships with the checkpoint.
        merge: run q, k, v as one matmul, and gate, up as one, if their bits and groups agree. That is faster on a GPU.
        make_linear: makes the module for a packed weight.

    Raises CheckpointError if a tensor is missing, left over or does not fit: with one wrong tensor a model would still
    write text, only worse.
    """
    target, path = pick_device(device), Path(directory)
    if not path.is_dir() or gguf_in(path):
        path = locate(str(directory), trust_remote_code)
        if not is_packed(path):
            source = ModelSource(str(directory), trust_remote_code)
            return source.load_all(target, _dtype_for(dtype, target, source))
    checkpoint = Checkpoint(path)
    config, runs = checked_config(checkpoint, trust_remote_code)
    exact, dtype = dtype is not None, _dtype_for(dtype, target, config, packed=True)
    model = build_skeleton(config, trust_remote_code)
    checkpoint = checkpoint.for_model(model)
    wanted = check_fit(model, checkpoint)
    replace_linears(model, checkpoint, lambda *parts: make_linear(*parts).to(target), lambda _: target)
    placed = {f"{name}.bias" for name in checkpoint.linears}
    _load_others(model, checkpoint, sorted(wanted - placed), target, dtype)
    model.config.dtype = dtype
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.exact = exact
    for name, scheme in checkpoint.schemes.items():
        if isinstance(linear := model.get_submodule(name), PackedLinear):
            linear.rounds_inputs |= scheme.rounded_inputs == TOKEN
    group_experts(model)
    attach(model, checkpoint)
    read_generation_config(model, checkpoint.directory)
    if merge:
        merge_linears(model)
    # Code that branches on values (mixtures of experts) cannot run on the meta device, so it is tried here.
    reason = None if runs else failure(model.eval(), target)
    if reason is not None:
        raise CheckpointError(f"{checkpoint.directory}: {CONFIG} describes a model that does not run: {reason}")
    return model.eval()


def load_any(
    spec: str, device: str = "auto", trust_remote_code: bool = False, exact: bool = False, merge: bool = False
) -> tuple[Any, Any]:
    """Load a packed checkpoint or an original model, and return (model, tokenizer).

    The model computes in float32 on a CPU and in the dtype of its files on a GPU. `exact`: in float32 on a CPU however
    few tokens there are; `merge`: see `load`.
    """
    path = locate(spec, trust_remote_code)
    target = pick_device(device)
    if is_packed(path):
        dtype = torch.float32 if exact and target.type == "cpu" else None
        return load(path, device, dtype, trust_remote_code, merge), open_tokenizer(path, trust_remote_code)
    source = ModelSource(spec, trust_remote_code)
    return source.load_all(target, torch.float32 if target.type == "cpu" else source.dtype), source.tokenizer


def _dtype_for(asked: torch.dtype | str | None, device: torch.device, config: Any, packed: bool = False) -> torch.dtype:
    """Return the dtype to compute in. Raises RequestError for a name that is none."""
    if asked is None and device.type == "cpu":
        return torch.float32
    name = config.dtype if asked is None else asked
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if asked is None and packed and dtype == torch.float32:
        return torch.bfloat16
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return dtype
    if asked is None:
        return torch.float16
    raise RequestError(f"dtype must be float32, bfloat16 or float16, of torch or as a name; got {asked!r}")


def open_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """Open the tokenizer in a directory or a .gguf file. Raises CheckpointError if transformers cannot."""
    try:
        if (file := gguf_in(path)) is not None:
            read_header(file)  # as `parsed_once` wants it
            with parsed_once():
                return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen tokenizer classes, each with its own way to fail
        raise CheckpointError(f"{path} holds no tokenizer transformers can read ({type(error).__name__})") from None


def _load_others(
    model: Any, checkpoint: Checkpoint, names: list[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Load the tensors that are not packed, and move all buffers to the device."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = checkpoint.files.read(name)
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    move_buffers(model, device)
