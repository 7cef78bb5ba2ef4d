"""GPTQ checkpoints, v1 and v2: read by GPTQModel, AutoGPTQ, vLLM, SGLang, and transformers with gptqmodel.

    NAME.qweight  int32 [ceil(in*bits/32), out]      codes along the inputs, one bit stream per output
    NAME.qzeros   int32 [groups, ceil(out*bits/32)]  zero points along the outputs; v1: zero - 1
    NAME.scales   float [groups, out]
    NAME.g_idx    int32 [in]                         group of each input

v1 cannot store zero = 0: its readers disagree on what the stored -1 means. Symmetric weights have their zero in the
middle, so they are written as v1, which every reader knows. Other weights are written as v2, even where no zero is 0:
GPTQModel 7.7.0 refuses asymmetric v1 files that it did not write itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llmq.core.config import VERSION
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import GPTQ_BITS
from llmq.formats.name_patterns import Patterns, pattern_of_experts, without_experts
from llmq.formats.packing import pack_stream, packed_length, unpack_stream
from llmq.formats.scheme import (
    Scheme,
    Schemes,
    checked,
    entry,
    expect_scales,
    expect_words,
    part_of,
    tables,
    with_known_bits,
    zero_codes,
)

METHOD = "gptq"
TENSOR_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Entries of a `dynamic` rule, and the field of the scheme that each changes.
_OVERRIDES = {"bits": "bits", "group_size": "group_size", "sym": "symmetric", "desc_act": "act_order"}
# Engines that fuse layers ask for the fused name.
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
ASYMMETRIC_NOTE = (
    "onnxruntime-genai 0.18.0 reads asymmetric gptq files wrongly, by one step; it reads awq (4 bit) right"
)


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of one linear by their full names. The weight is not changed.

    Raises CheckpointError for inputs that fill no whole words: a reader counts the inputs by the words.
    """
    columns = weight.q.shape[1]
    if columns * weight.bits % 32:
        raise CheckpointError(f"{name}: {columns} inputs of {weight.bits} bits fill no whole words: use another format")
    zero = zero_codes(name, weight) - (1 if scheme.symmetric else 0)
    group_of = weight.group_of
    if group_of is None:
        group_of = torch.arange(columns, dtype=torch.int32, device=weight.q.device) // weight.group_size
    return {
        f"{name}.qweight": pack_stream(weight.q, weight.bits).T.contiguous(),
        f"{name}.qzeros": pack_stream(zero.T.contiguous(), weight.bits),
        f"{name}.scales": weight.scale.T.contiguous(),
        f"{name}.g_idx": group_of,
    }


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` or another tool wrote: `g_idx` may be missing, the last group short.

    Raises CheckpointError if tensors are missing or do not fit together.
    """
    qweight, scales = part_of(name, tensors, "qweight"), part_of(name, tensors, "scales")
    if qweight.ndim != 2 or not qweight.numel() or 32 * qweight.shape[0] % scheme.bits:
        raise CheckpointError(f"{name}.qweight: {tuple(qweight.shape)} holds no rows of {scheme.bits}-bit codes")
    columns, rows = 32 * qweight.shape[0] // scheme.bits, qweight.shape[1]
    groups = scheme.groups(columns)
    expect_words(f"{name}.qweight", qweight, (packed_length(columns, scheme.bits), rows))
    expect_words(f"{name}.qzeros", part_of(name, tensors, "qzeros"), (groups, packed_length(rows, scheme.bits)))
    expect_scales(f"{name}.scales", scales, (groups, rows))
    stored = unpack_stream(tensors[f"{name}.qzeros"], scheme.bits, rows).T.contiguous()
    if scheme.zero_offset and bool((stored == 2**scheme.bits - 1).any()):
        raise CheckpointError(f"{name}: has a zero point of -1 or {2**scheme.bits}; GPTQ v1 cannot tell which: use v2")
    weight = QuantizedWeight(
        unpack_stream(qweight.T, scheme.bits, columns),
        scales.T.contiguous(),
        stored + scheme.zero_offset,
        scheme.bits,
        _group_of(name, tensors.get(f"{name}.g_idx"), qweight.new_zeros(columns), groups, scheme),
    )
    return checked(name, weight, scheme)


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json. Layers that differ from most become `dynamic` rules.

    transformers does not know such rules. Raises CheckpointError for bits that engines do not read in this format, and
    if only some layers are symmetric: a file has one meaning of zero points.
    """
    most = max(schemes.values(), key=list(schemes.values()).count)
    with_known_bits(METHOD, schemes, GPTQ_BITS)
    if any(scheme.symmetric != most.symmetric for scheme in schemes.values()):
        raise CheckpointError("gptq stores one kind of zero points; make all layers symmetric, or none")
    others: dict[Scheme, list[str]] = defaultdict(list)
    for name in sorted(schemes):
        others[schemes[name]].append(name)
    dynamic = {_rule(names, schemes): _changes(scheme, most) for scheme, names in others.items() if scheme != most}
    # Without a rule, readers take every linear inside the blocks as packed. `lm_head` below says it of the head.
    if left_out := [name for name in ignore if name != "lm_head"]:
        dynamic[_rule(left_out, schemes, "-:")] = {}
    config = {
        "quant_method": METHOD,
        "bits": most.bits,
        "group_size": most.group_size,
        "desc_act": most.act_order,
        "sym": most.symmetric,
        "lm_head": "lm_head" in schemes,
        "checkpoint_format": "gptq" if most.symmetric else "gptq_v2",
        "meta": {"quantizer": [f"llmq:{VERSION}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear, from a `quantization_config` or `quantize_config.json`.

    Raises CheckpointError for dialects that llmq does not read.
    """
    dialect = entry(config, "checkpoint_format", "format", default="gptq")
    words = entry(config, "pack_dtype", default="int32")
    if dialect not in ("gptq", "gptq_v2") or words != "int32":
        raise CheckpointError(f"a GPTQ file of the kind {dialect!r} in {words} words; llmq reads gptq, gptq_v2, int32")
    size = entry(config, "group_size", default=128)
    flags = entry(config, "sym", default=True), entry(config, "desc_act", default=False)
    most = Scheme.of(config.get("bits", 4), size, *flags, zero_offset=int(dialect == "gptq"))
    rules, patterns = tables("dynamic", entry(config, "dynamic", default={})), Patterns()
    schemes = {name: _overridden(name, most, rules, patterns) for name in names}
    return with_known_bits(METHOD, schemes, GPTQ_BITS)


def _overridden(name: str, most: Scheme, rules: dict[str, Any], patterns: Patterns) -> Scheme:
    """Return the scheme of a linear. The first rule that fits decides; rules that exclude layers come first."""
    for rule, changes in sorted(rules.items(), key=lambda item: not item[0].startswith("-:")):
        if not patterns.match(rule[2:] if rule[:2] in ("-:", "+:") else rule, name):
            continue
        if rule.startswith("-:"):
            raise CheckpointError(f"{name} is packed, although the rule {rule[:80]!r} leaves it out")
        return most.changed({_OVERRIDES[key]: value for key, value in changes.items() if key in _OVERRIDES})
    return most


def _group_of(name: str, stored: Tensor | None, natural: Tensor, groups: int, scheme: Scheme) -> Tensor | None:
    """Return the group of each input, or None if groups are contiguous and of one size. `natural`: a zero per input."""
    columns = len(natural)
    if scheme.group_size != -1:
        natural = torch.arange(columns, dtype=torch.int32, device=natural.device) // min(scheme.group_size, columns)
    even = columns % groups == 0 and (groups == 1 or columns // groups == scheme.group_size)
    if stored is None:
        if scheme.act_order:
            raise CheckpointError(f"{name}: {name}.g_idx is missing; act-order weights cannot be read without it")
        return None if even else natural
    expect_words(f"{name}.g_idx", stored, (columns,))
    if torch.equal(stored, natural):
        return None if even else natural
    if not scheme.act_order:  # then some engines do not look at g_idx
        raise CheckpointError(f"{name}: g_idx spreads the groups over the row, although the config says no desc_act")
    return stored


def _rule(names: list[str], schemes: Schemes, sign: str = "+:") -> str:
    """Return one rule for these linears and their fused names. Readers try every rule on every name: one is fast.

    vLLM looks for the experts of a module under the module's own name.
    """
    single, modules = without_experts(names, schemes.keys() - set(names))
    split = [name.rpartition(".") for name in single]
    fused = [f"{parent}.{_FUSED[leaf]}" for parent, _, leaf in split if leaf in _FUSED]
    escaped = [re.escape(name) for name in [*single, *fused, *modules]]
    return f"{sign}^({'|'.join([*escaped, *map(pattern_of_experts, modules)])})$"


def _changes(scheme: Scheme, most: Scheme) -> dict[str, Any]:
    """Return the entries of a rule that makes this scheme out of the most frequent one."""
    values, usual = asdict(scheme), asdict(most)
    return {key: values[field] for key, field in _OVERRIDES.items() if values[field] != usual[field]}
