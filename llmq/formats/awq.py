"""AWQ checkpoints, version GEMM, 4 bit: read by vLLM (Marlin), SGLang, AutoAWQ, and transformers with gptqmodel.

NAME.qweight  int32 [in, out/8]       eight outputs of one input per word
NAME.qzeros   int32 [groups, out/8]   eight outputs of one group per word
NAME.scales   float [groups, out]

nibble of word c, low to high:   0     1     2     3     4     5     6     7
output:                        8c+0  8c+2  8c+4  8c+6  8c+1  8c+3  8c+5  8c+7
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.packing import pack_stream, strips
from llmq.formats.scheme import (
    Scheme,
    Schemes,
    checked,
    entry,
    expect_scales,
    expect_words,
    part_of,
    the_only,
    zero_codes,
)

METHOD = "awq"
TENSOR_SUFFIXES = ("qweight", "qzeros", "scales")
_BITS, _PER_WORD = 4, 8
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:  # noqa: ARG001 like its siblings
    """Return the tensors of one linear by their full names. The weight is not changed.

    Raises CheckpointError for what the format cannot store: other bits, act order, outputs that fill no whole words.
    """
    rows = weight.q.shape[0]
    if weight.bits != _BITS:
        raise CheckpointError(f"{name}: awq stores 4-bit weights; this one has {weight.bits} bits: use gptq")
    if weight.group_of is not None:
        raise CheckpointError(f"{name}: awq stores contiguous groups of one size; use gptq for others")
    if rows % _PER_WORD:
        raise CheckpointError(f"{name}: awq packs eight outputs in a word; {rows} outputs are not a multiple of 8")
    return {
        f"{name}.qweight": _pack(weight.q.T),
        f"{name}.qzeros": _pack(zero_codes(name, weight).T),
        f"{name}.scales": weight.scale.T.contiguous(),
    }


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` wrote. Raises CheckpointError if tensors are missing or do not fit together."""
    qweight, scales = part_of(name, tensors, "qweight"), part_of(name, tensors, "scales")
    if scheme.bits != _BITS:
        raise CheckpointError(f"{name}: awq stores 4-bit weights; its config says {scheme.bits} bits")
    if qweight.ndim != 2 or not qweight.numel():
        raise CheckpointError(f"{name}.qweight: expected a matrix, found {tuple(qweight.shape)}")
    columns, words = qweight.shape
    groups = scheme.groups(columns)
    if columns % groups or (groups > 1 and columns // groups != scheme.group_size):
        raise CheckpointError(f"{name}: group size {scheme.group_size} does not divide {columns} inputs")
    expect_words(f"{name}.qweight", qweight, (columns, words))
    expect_words(f"{name}.qzeros", part_of(name, tensors, "qzeros"), (groups, words))
    expect_scales(f"{name}.scales", scales, (groups, _PER_WORD * words))
    zero = _unpack(tensors[f"{name}.qzeros"])
    return checked(name, QuantizedWeight(_unpack(qweight), scales.T.contiguous(), zero, _BITS), scheme)


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json. `ignore` lists every nn.Linear that stays in float.

    Raises CheckpointError if layers differ or do not have 4 bits.
    """
    bits = the_only(schemes, lambda s: s.bits, "awq stores one number of bits, for all layers")
    if bits != _BITS:
        raise CheckpointError(f"awq stores 4-bit weights; these have {bits} bits")
    return {
        "quant_method": METHOD,
        "bits": _BITS,
        "group_size": the_only(schemes, lambda s: s.group_size, "awq stores one group size for all layers"),
        "zero_point": True,  # always stored: 8 for symmetric weights
        "sym": the_only(schemes, lambda s: s.symmetric, "awq stores one kind of zero points for all layers"),
        "version": "gemm",
        "modules_to_not_convert": ignore or None,
    }


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear. Raises CheckpointError unless the config says GEMM and 4 bits."""
    bits, version = entry(config, "bits", "w_bit", default=_BITS), str(entry(config, "version", default="gemm")).lower()
    if version != "gemm" or bits != _BITS:
        raise CheckpointError(f"an AWQ checkpoint of version {version!r} with {bits} bits; llmq reads gemm with 4")
    symmetric = entry(config, "sym", default=entry(config, "zero_point", default=True) is False)
    scheme = Scheme.of(bits, entry(config, "group_size", "q_group_size", default=128), symmetric)
    return dict.fromkeys(names, scheme)


def _pack(codes: UInt8[Tensor, "inputs out"]) -> Int32[Tensor, "inputs words"]:
    return pack_stream(codes.unflatten(1, (-1, _PER_WORD))[..., _ORDER].flatten(1), _BITS)


def _unpack(words: Int32[Tensor, "inputs words"]) -> UInt8[Tensor, "out inputs"]:
    codes = torch.empty(words.shape[1], _PER_WORD, words.shape[0], dtype=torch.uint8, device=words.device)
    for rows in strips(codes):
        part = words.T[rows].contiguous()
        for i, output in enumerate(_ORDER):
            codes[rows, output] = part >> _BITS * i & 15
    return codes.flatten(0, 1)
