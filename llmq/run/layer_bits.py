"""The bits of each linear (`--layer-bits NAME=BITS`), and the grid that all of them share."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import Grid
from llmq.models.block_structure import SIBLINGS
from llmq.models.experts import layouts, linears_of
from llmq.models.model_source import ModelSource
from llmq.models.packable import fit_group_size, packable_widths


def fitted_grid(
    config: QuantizeConfig, source: ModelSource, blocks: list[str], bits: dict[str, int]
) -> tuple[Grid, list[str]]:
    """Return the requested grid with a group size that divides every layer of these blocks, and notes on both."""
    widths = packable_widths({name: source.skeleton.get_submodule(name) for name in blocks}, bits)
    if not widths:
        raise RequestError("no linear of this model can be packed: none has both sides in multiples of 32")
    requested = config.grid_settings
    fitted = fit_group_size(requested.group_size, widths)
    same = fitted == requested.group_size
    notes = [] if same else [f"group size {requested.group_size} does not divide every layer: using {fitted}"]
    if config.stored_as == "compressed-tensors" and not config.symmetric:
        note = "asymmetric compressed-tensors: transformers opens it only with dequantize=True"
        notes.append(f"{note}, and not with --layer-bits (vLLM and llmq do)")
    if config.stored_as == "mlx" and config.symmetric:
        notes.append("mlx stores a bias for each group in any case; --no-symmetric uses it, in the same bytes")
    experts = tuple(f"{name}." for name in layouts(source.skeleton))
    of_experts = {width for name, width in bits.items() if name.startswith(experts)}
    if of_experts - {4, 8} or (of_experts and config.stored_as == "gptq" and not config.symmetric):
        notes.append("packed experts: vLLM and SGLang take only 4 and 8 bit, and in gptq only symmetric ones")
    return replace(requested, group_size=fitted), notes


def bits_of_linears(config: QuantizeConfig, source: ModelSource) -> dict[str, int]:
    """Return the bits of every linear of the blocks, by its name in the model; with a budget those to begin with.

    Raises RequestError if a pattern of `--layer-bits` fits no linear, or if linears that engines fuse would differ.
    """
    bits = dict.fromkeys(_linears(source), _usual(config)) | named_bits(config, source)
    _check_fused(bits)
    for module, layout in layouts(source.skeleton).items():
        names = (f"{module}.{number}.{name}" for number in range(layout.experts) for name in linears_of(layout))
        if len({bits[name] for name in names if name in bits}) > 1:
            raise RequestError(f"layer bits: engines run all experts of {module} in one scheme; give all the same bits")
    return bits


def _usual(config: QuantizeConfig) -> int:
    """Return the bits of linears without a name in `--layer-bits`.

    With a budget: those of its bits at which the most linears can be packed. What cannot be stays in float.
    """
    if config.spending is None:
        return config.bits
    return max(config.spending.widths, key=lambda bits: (math.gcd(bits, 8), bits == config.bits))


def named_bits(config: QuantizeConfig, source: ModelSource) -> dict[str, int]:
    """Return the bits of the linears that `--layer-bits` names. The first pattern that fits counts.

    Raises RequestError if a pattern fits no linear.
    """
    wanted, bits, used = config.other_bits, dict[str, int](), set[str]()
    for name in _linears(source):
        pattern = next((p for p in wanted if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")), None)
        if pattern is not None:
            bits[name] = wanted[pattern]
            used.add(pattern)
    if unused := [pattern for pattern in wanted if pattern not in used]:
        first = next(_linears(source))
        raise RequestError(f"layer bits: no linear of this model is called {unused[0]!r} (first: {first})")
    return bits


def _linears(source: ModelSource) -> Iterator[str]:
    for block in source.block_names:
        for inner, module in source.skeleton.get_submodule(block).named_modules():
            if isinstance(module, torch.nn.Linear):
                yield f"{block}.{inner}"


def bits_in(block: str, bits: dict[str, int]) -> dict[str, int]:
    """Return the bits of the linears of a block, by their name inside it."""
    return {name.removeprefix(block + "."): b for name, b in bits.items() if name.startswith(block + ".")}


def bits_of_group(bits: dict[str, int], block: str, linears: tuple[str, ...]) -> int:
    """Return the bits that the linears of a group share. Raises RequestError if the request gives them others."""
    found = {bits[f"{block}.{name}"] for name in linears}
    if len(found) > 1:
        names = ", ".join(linears)
        raise RequestError(f"layer bits: {names} share an input and are rounded together; give all the same bits")
    return found.pop()


def _check_fused(bits: dict[str, int]) -> None:
    """Raise RequestError if linears that engines run as one have different bits."""
    for name in bits:
        parent, _, leaf = name.rpartition(".")
        for fused in SIBLINGS:
            if leaf in fused and len({bits.get(f"{parent}.{sibling}", bits[name]) for sibling in fused}) > 1:
                raise RequestError(f"layer bits: engines fuse {', '.join(fused)} of {parent}; give all the same bits")
