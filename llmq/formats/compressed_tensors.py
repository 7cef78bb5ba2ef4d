"""compressed-tensors `pack-quantized`: read by transformers, vLLM (Marlin at 4 and 8 bit) and SGLang.

    NAME.weight_packed      int32 [out, ceil(in*bits/32)]      codes along the inputs, one bit stream per row
    NAME.weight_scale       float [out, groups]
    NAME.weight_shape       int64 [2]                          (out, in)
    NAME.weight_zero_point  int32 [ceil(out*bits/32), groups]  asymmetric only, packed along the outputs

Bytes as the compressed-tensors 0.20.0 package writes and reads them.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.config import BITS
from llmq.errors import CheckpointError
from llmq.formats.packing import pack_stream, packed_length, unpack_stream
from llmq.weight import QuantizedWeight

METHOD = "compressed-tensors"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def encode(name: str, weight: QuantizedWeight, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of one linear, by full name. Symmetric weights have no zero points on disk. Input stays as it is."""
    if weight.group_of is not None:
        raise CheckpointError(f"{name}: compressed-tensors stores contiguous groups only; reorder the columns first")
    tensors = {
        f"{name}.weight_packed": pack_stream(weight.q, weight.bits),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_stream(weight.zero, weight.bits, axis=0)
    return tensors


def decode(name: str, tensors: dict[str, Tensor], scheme: dict[str, Any]) -> QuantizedWeight:
    """The linear that `encode` wrote. `scheme` is the `weights` entry of its config group.

    Raises CheckpointError if parts are missing or do not fit together.
    """
    bits = scheme["num_bits"]
    try:
        packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
        shape: Any = tensors[f"{name}.weight_shape"].tolist()
        zeros = None if scheme["symmetric"] else tensors[f"{name}.weight_zero_point"]
    except KeyError as error:
        raise CheckpointError(f"{name}: {error.args[0]} is missing") from None
    if scheme["symmetric"] and f"{name}.weight_zero_point" in tensors:
        raise CheckpointError(f"{name}: has zero points, although its scheme says symmetric")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise CheckpointError(f"{name}.weight_shape: expected two positive integers, found {shape}")
    rows, columns = shape
    groups = _groups(name, columns, scheme)
    _expect(f"{name}.weight_packed", packed, (rows, packed_length(columns, bits)))
    if tuple(scale.shape) != (rows, groups) or not scale.is_floating_point():
        raise CheckpointError(
            f"{name}.weight_scale: expected floats {(rows, groups)}, found {scale.dtype} {tuple(scale.shape)}"
        )
    if zeros is None:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        _expect(f"{name}.weight_zero_point", zeros, (packed_length(rows, bits), groups))
        zero = unpack_stream(zeros, bits, rows, axis=0)
    weight = QuantizedWeight(unpack_stream(packed, bits, columns), scale, zero, bits)
    weight.validate(name)
    return weight


def hf_config(bits: int, group_size: int, symmetric: bool, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. `ignore` lists every nn.Linear that stays in float."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}
    return {
        "quant_method": METHOD,
        "version": "0.20.0",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
    }


def scheme_of(config: dict[str, Any]) -> dict[str, Any]:
    """The one `weights` scheme of a `quantization_config` that `hf_config` wrote.

    Raises CheckpointError for what llmq does not read: other formats, several groups, activation quantization.
    """
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    group: Any = groups[0] if len(groups) == 1 and isinstance(groups[0], dict) else {}
    if config.get("format") != "pack-quantized" or group.get("targets") != ["Linear"]:
        raise CheckpointError(
            "of compressed-tensors only pack-quantized with one group for all Linear layers is read; "
            f"found format {config.get('format')!r} with {len(groups)} groups"
        )
    weights: Any = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError("the compressed-tensors group has no weights scheme")
    size = weights.get("group_size")
    fits = weights.get("type") == "int" and weights.get("num_bits") in BITS and "symmetric" in weights
    fits = fits and (size is None or (isinstance(size, int) and (size == -1 or size >= 1)))
    if not fits or group.get("input_activations") is not None or weights.get("actorder") == "group":
        raise CheckpointError(f"unsupported compressed-tensors scheme: {weights}")
    return weights


def _groups(name: str, columns: int, scheme: dict[str, Any]) -> int:
    """Scales per row. The scheme decides, not the tensor: half of the scales would fit too, at twice the group size."""
    size = scheme.get("group_size") or -1
    if size == -1:
        return 1
    if columns % size:
        raise CheckpointError(f"{name}: group size {size} does not divide {columns} inputs")
    return columns // size


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected int32 {shape}, found {tensor.dtype} {tuple(tensor.shape)}")
