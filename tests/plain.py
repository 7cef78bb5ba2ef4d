"""A plain reference for packed checkpoints: bit by bit, without llmq, from nothing but the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

# Which code computes attention, and what a model returns beside logits, is not for a checkpoint to say.
NOT_THEIRS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "output_attentions",
    "return_dict",
)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory: of its one file, else from the shards that its index names if it has one."""
    index = directory / "model.safetensors.index.json"
    if index.exists() and not (directory / "model.safetensors").exists():
        shard_of = json.loads(index.read_bytes())["weight_map"]
    else:
        shard_of = {
            name: path.name
            for path in directory.glob("*.safetensors")
            for name in safe_open(path, "pt").keys()  # noqa: SIM118 it is no mapping
        }
    return {name: safe_open(directory / shard, "pt").get_tensor(name) for name, shard in shard_of.items()}


def decode(tensors: dict[str, Tensor], kind: str, bits: int, group_size: int) -> dict[str, Tensor]:
    """The tensors of a dense model in float32. kind: compressed-tensors, gptq (zero points less one), awq or mlx."""
    code_part = {"compressed-tensors": "weight_packed", "mlx": "scales"}.get(kind, "qweight")
    dense = dict(tensors)
    for name in [name.removesuffix(f".{code_part}") for name in tensors if name.endswith(f".{code_part}")]:
        parts = {key.removeprefix(f"{name}."): dense.pop(key) for key in tensors if key.rpartition(".")[0] == name}
        bias = parts.pop("bias", None)
        dense[f"{name}.weight"] = _weight(parts, kind, bits, group_size)
        if bias is not None:
            dense[f"{name}.bias"] = bias
    return {name: tensor.float() for name, tensor in dense.items()}


def _weight(parts: dict[str, Tensor], kind: str, bits: int, group_size: int) -> Tensor:
    if kind == "mlx":
        codes = _codes(parts["weight"].view(torch.int32), bits)
        scales, biases = (parts[part].double().repeat_interleave(group_size, 1) for part in ("scales", "biases"))
        return (scales * codes + biases).float()
    if kind == "compressed-tensors":
        rows, columns = parts["weight_shape"].tolist()
        codes, scales = _codes(parts["weight_packed"], bits)[:, :columns], parts["weight_scale"]
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zeros = _codes(parts["weight_zero_point"].T, bits).T[:rows]
    elif kind == "gptq":
        codes, scales = _codes(parts["qweight"].T, bits), parts["scales"].T
        zeros = _codes(parts["qzeros"], bits).T + 1
    else:
        codes, zeros = (
            _codes(parts[part], 4).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T for part in ("qweight", "qzeros")
        )
        scales = parts["scales"].T
    group_of = parts.get("g_idx", torch.arange(codes.shape[1]) // group_size).long()
    return scales.float()[:, group_of] * (codes - zeros[:, group_of])


def _codes(words: Tensor, bits: int) -> Tensor:
    """The numbers of so many bits in each row, lowest bit first; what is left at the end is none."""
    stream = (words.long()[..., None] >> torch.arange(32) & 1).flatten(1)
    stream = stream[:, : stream.shape[1] // bits * bits].unflatten(1, (-1, bits))
    return (stream << torch.arange(bits)).sum(-1)


def dense_model(directory: Path, scratch: Path) -> Any:
    """The model of a directory's config.json, in which nothing is quantized, with weights that mean nothing yet."""
    config = json.loads((directory / "config.json").read_bytes())
    for name in ("quantization_config", "quantization", *NOT_THEIRS):
        config.pop(name, None)
    scratch.mkdir(exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(scratch), dtype=torch.float32).eval()


def fill(model: Any, dense: dict[str, Tensor]) -> Any:
    """Give a dense model these weights: all of its own, and no others that would matter."""
    head, embeddings = dense.get("lm_head.weight"), dense.get("model.embed_tokens.weight")
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        model.config.tie_word_embeddings = False  # a head of its own is used, whatever the config says
    mine = model.state_dict()
    tied = {name for name in mine if name not in dense}
    assert tied <= set(model._tied_weights_keys or ()), tied
    tops = {name.partition(".")[0] for name in mine}
    left = {name for name in dense.keys() - mine.keys() if "." in name and name.partition(".")[0] in tops}
    left = {name for name in left if not name.endswith("inv_freq") and dense[name].any()}
    assert not left, left
    model.load_state_dict({name: tensor for name, tensor in dense.items() if name in mine}, strict=False)
    model.tie_weights()
    return model
