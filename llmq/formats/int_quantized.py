"""compressed-tensors `int-quantized`: integer weights beside 8-bit inputs (W8A8, W4A8), for vLLM's int8 kernels.

    NAME.weight         int8 [out, in]         code - 2^(bits-1)
    NAME.weight_scale   float [out, groups]
    NAME.input_scale    float [1]              only where inputs have one scale for all tokens

Symmetric only. vLLM runs W8A8 with one scale per row on every GPU since Turing (CompressedTensorsW8A8Int8), and W4A8 on
Arm CPUs (CompressedTensorsW4A8Int). The bytes are those that the compressed-tensors 0.20.0 package writes and reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import compressed_tensors
from llmq.formats.scheme import Scheme, Schemes, checked, expect_scales, input_scale_of, part_of

METHOD = "int-quantized"
TENSOR_SUFFIXES = ("weight_scale", "weight", "input_scale")


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of one linear by their full names. Raises CheckpointError for what the format cannot store."""
    if not (scheme.symmetric and scheme.rounded_inputs and scheme.bits in (4, 8)) or weight.group_of is not None:
        raise CheckpointError(f"{name}: int-quantized stores symmetric 4 and 8 bit weights beside 8-bit inputs")
    steps = weight.q.to(torch.int16) - 2 ** (weight.bits - 1)
    tensors = {f"{name}.weight": steps.to(torch.int8), f"{name}.weight_scale": weight.scale.contiguous()}
    return tensors if weight.input_scale is None else tensors | {f"{name}.input_scale": weight.input_scale}


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` wrote. Raises CheckpointError if tensors are missing or do not fit together."""
    steps, scale = (part_of(name, tensors, suffix) for suffix in ("weight", "weight_scale"))
    if steps.dtype != torch.int8 or steps.ndim != 2 or not steps.numel():
        raise CheckpointError(f"{name}.weight: expected an int8 matrix, found {steps.dtype} {tuple(steps.shape)}")
    half, (rows, columns) = 2 ** (scheme.bits - 1), steps.shape
    groups = scheme.groups(columns)
    if columns % groups or (groups > 1 and columns // groups != scheme.group_size):
        raise CheckpointError(f"{name}: group size {scheme.group_size} does not divide {columns} inputs")
    expect_scales(f"{name}.weight_scale", scale, (rows, groups))
    if int(steps.min()) < -half or int(steps.max()) >= half:
        raise CheckpointError(f"{name}: a weight exceeds {scheme.bits} bits")
    zero = torch.full_like(scale, half, dtype=torch.uint8)
    codes, of_inputs = (steps.to(torch.int16) + half).to(torch.uint8), input_scale_of(name, tensors, scheme)
    return checked(name, QuantizedWeight(codes, scale, zero, scheme.bits, input_scale=of_inputs), scheme)


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json. `ignore` lists every nn.Linear that stays in float."""
    config = compressed_tensors.hf_config(schemes, ignore)
    groups = {name: group | {"format": METHOD} for name, group in config["config_groups"].items()}
    return config | {"format": METHOD, "config_groups": groups}


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear. Raises CheckpointError for what llmq does not read."""
    schemes = compressed_tensors.schemes_stored_as(METHOD, config, names)
    for name, scheme in schemes.items():
        if not scheme.symmetric or not scheme.rounded_inputs:
            raise CheckpointError(f"{name}: of int-quantized, symmetric weights beside 8-bit inputs are read")
    return schemes
