"""compressed-tensors `pack-quantized`: read by transformers, vLLM (Marlin at 4 and 8 bit) and SGLang.

    NAME.weight_packed      int32 [out, ceil(in*bits/32)]      codes along the inputs, one bit stream per row
    NAME.weight_scale       float [out, groups]
    NAME.weight_shape       int64 [2]                          (out, in)
    NAME.weight_zero_point  int32 [ceil(out*bits/32), groups]  asymmetric only, packed along the outputs
    NAME.input_scale        float [1]                          only where inputs have one scale for all tokens

The bytes are those that the compressed-tensors 0.20.0 package writes and reads.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import TENSOR, TOKEN
from llmq.formats.name_patterns import Patterns, pattern_of_experts, without_experts
from llmq.formats.packing import pack_stream, packed_length, unpack_stream
from llmq.formats.scheme import (
    Scheme,
    Schemes,
    checked,
    entry,
    expect_scales,
    expect_words,
    input_scale_of,
    part_of,
    tables,
    zero_codes,
)

METHOD, PACKED = "compressed-tensors", "pack-quantized"
_INPUTS = {
    how: {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": how == TOKEN, "strategy": how}
    for how in (TOKEN, TENSOR)
}
"""Inputs in 8 bits. vLLM reads a scale for each token beside packed weights (CompressedTensorsWNA8Int)."""
TENSOR_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of one linear by their full names. Symmetric weights have no zero points on disk."""
    if weight.group_of is not None:
        raise CheckpointError(f"{name}: compressed-tensors stores contiguous groups of one size; use gptq for others")
    tensors = {
        f"{name}.weight_packed": pack_stream(weight.q, weight.bits),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_stream(zero_codes(name, weight), weight.bits, axis=0)
    if weight.input_scale is not None:
        tensors[f"{name}.input_scale"] = weight.input_scale
    return tensors


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` wrote. Raises CheckpointError if tensors are missing or do not fit together."""
    bits = scheme.bits
    packed, scale = (part_of(name, tensors, suffix) for suffix in ("weight_packed", "weight_scale"))
    rows, columns = _shape(name, part_of(name, tensors, "weight_shape"))
    if scheme.symmetric and f"{name}.weight_zero_point" in tensors:
        raise CheckpointError(f"{name}: has zero points, although the config says symmetric")
    # The scheme gives the number of groups, not the tensor: half of the scales would fit twice the group size.
    groups = scheme.groups(columns)
    if columns % groups or (groups > 1 and columns // groups != scheme.group_size):
        raise CheckpointError(f"{name}: group size {scheme.group_size} does not divide {columns} inputs")
    whole = 32 // bits  # codes that fit into a word; the rest of its bits was left unused
    if packed.shape[-1] == -(-columns // whole) != packed_length(columns, bits):
        raise CheckpointError(
            f"{name}: packed by compressed-tensors before 0.18, which puts {whole} {bits}-bit codes into a word; "
            "write it again with 0.18 or later"
        )
    expect_words(f"{name}.weight_packed", packed, (rows, packed_length(columns, bits)))
    expect_scales(f"{name}.weight_scale", scale, (rows, groups))
    if scheme.symmetric:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = part_of(name, tensors, "weight_zero_point")
        expect_words(f"{name}.weight_zero_point", zeros, (packed_length(rows, bits), groups))
        zero = unpack_stream(zeros, bits, rows, axis=0)
    codes, of_inputs = unpack_stream(packed, bits, columns), input_scale_of(name, tensors, scheme)
    return checked(name, QuantizedWeight(codes, scale, zero, bits, input_scale=of_inputs), scheme)


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json. `ignore` lists every nn.Linear that stays in float.

    One scheme becomes a group for every Linear. Several schemes become groups of full names: if two patterns fit,
    readers disagree on the order. Engines that fuse layers look for the names of the single layers; all experts of a
    module are one pattern.
    """
    layers: dict[Scheme, list[str]] = defaultdict(list)
    for name in sorted(schemes):
        layers[schemes[name]].append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(layers) == 1 else _targets(names, schemes),
            "format": PACKED,
            "weights": _weights(scheme),
            "input_activations": dict(_INPUTS[scheme.rounded_inputs]) if scheme.rounded_inputs else None,
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(layers.items())
    }
    return {
        "quant_method": METHOD,
        "version": "0.20.0",
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _targets(ignore, schemes),
        "config_groups": groups,
    }


def with_rounded_inputs(config: Mapping[str, Any], how: str = TOKEN) -> dict[str, Any]:
    """Return a `quantization_config` that says the same, and that all linears round their inputs, if not yet so."""
    groups = {
        name: group if group.get("input_activations") else group | {"input_activations": dict(_INPUTS[how])}
        for name, group in config["config_groups"].items()
    }
    return {**config, "config_groups": groups}


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear. Raises CheckpointError for what llmq does not read."""
    return schemes_stored_as(PACKED, config, names)


def schemes_stored_as(form: str, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each linear, which must be stored in this form.

    A target is a full name, a pattern (re:...) or "Linear".

    Raises CheckpointError for what llmq does not read: other formats, inputs rounded in other ways, packed layers that
    no group names.
    """
    targets: dict[str, Scheme] = {}
    for group in tables("config_groups", config.get("config_groups")).values():
        scheme = _scheme(group, config.get("format"), form)
        for target in _strings("targets", group.get("targets")):
            if targets.setdefault(target, scheme) != scheme:
                raise CheckpointError(f"two groups of different schemes both name {target[:80]!r}")
    ignored, patterns = set(_strings("ignore", entry(config, "ignore", default=[]))), Patterns()
    of_targets, of_ignored = (sorted(t for t in texts if t.startswith("re:")) for texts in (targets, ignored))
    schemes: dict[str, Scheme] = {}
    for name in names:
        if _fitting(name, ignored, of_ignored, patterns) is not None:
            raise CheckpointError(f"{name} is packed, although the config ignores it")
        target = _fitting(name, targets, of_targets, patterns)
        if target is None:
            raise CheckpointError(f"{name} is packed, but no group of the config is meant for it")
        schemes[name] = targets[target]
    return schemes


def _fitting(name: str, targets: Container[str], expressions: list[str], patterns: Patterns) -> str | None:
    """Return the target that fits a name. The order is that of the package: the name, patterns, the class."""
    if name in targets:
        return name
    by_pattern = next((target for target in expressions if patterns.match(target[3:], name)), None)
    return by_pattern or ("Linear" if "Linear" in targets else None)


def _targets(names: Iterable[str], schemes: Schemes) -> list[str]:
    """Return targets for these linears: their names, and patterns for experts."""
    own = set(names)
    single, modules = without_experts(names, schemes.keys() - own)
    return [*single, *(f"re:{pattern_of_experts(module)}$" for module in modules)]


def _weights(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        return weights | {"strategy": "channel"}
    return weights | {"strategy": "group", "group_size": scheme.group_size}


def _scheme(group: dict[str, Any], overall: Any, wanted: str) -> Scheme:
    """Return the scheme of a config group. Raises CheckpointError for one that llmq does not read."""
    form = entry(group, "format", default=overall)
    weights = tables("a group", {"weights": group.get("weights")})["weights"]
    if form != wanted:
        raise CheckpointError(
            f"of compressed-tensors only {PACKED} and int-quantized are read, one of them in a file; "
            f"found format {form!r}"
        )
    strategy, size = weights.get("strategy"), entry(weights, "group_size", default=-1)
    fits = weights.get("type") == "int" and not weights.get("dynamic") and strategy in ("group", "channel", None)
    fits = fits and (strategy is None or (strategy == "channel") == (size == -1))
    # actorder "group" needs indices that the package no longer writes; the other values leave groups contiguous.
    fits = fits and weights.get("actorder") in (None, "weight", "static")
    if not fits:
        raise CheckpointError(f"unsupported scheme {str(weights)[:300]}; llmq reads int weights in groups or rows")
    scheme = Scheme.of(weights.get("num_bits", 8), size, entry(weights, "symmetric", default=True))
    return replace(scheme, rounded_inputs=_rounds(group.get("input_activations")))


def _rounds(inputs: Any) -> str:
    """Return how inputs are rounded to 8 bits. Raises CheckpointError for another way to round them."""
    if inputs is None:
        return ""
    for how, wanted in _INPUTS.items():
        if isinstance(inputs, dict) and all(inputs.get(key) == value for key, value in wanted.items()):
            return how
    ways = "a scale for each token, or one in the file"
    raise CheckpointError(f"unsupported inputs {str(inputs)[:300]}; llmq reads 8 bit with {ways}")


def _shape(name: str, stored: Tensor) -> tuple[int, int]:
    shape: Any = stored.tolist()
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise CheckpointError(f"{name}.weight_shape: expected two positive integers, found {str(shape)[:80]}")
    return shape[0], shape[1]


def _strings(what: str, found: Any) -> list[str]:
    names: list[Any] = found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) for name in names) or names is not found:
        raise CheckpointError(f"{what} must be a list of names; found {str(found)[:80]}")
    return names
