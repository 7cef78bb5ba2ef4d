"""Which linears can be packed, in groups of which size, and which ones stay in float."""

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import TypeVar

from torch import nn

from llmq.core.errors import RequestError
from llmq.models.block_structure import SIBLINGS, Group, linear_of
from llmq.models.model_files import ModelFiles
from llmq.models.routers import is_router, routing_linears

_Scheme = TypeVar("_Scheme")
# Linears that engines run as one matrix: also those of latent attention, of linear attention (Qwen3.5) and of LFM2.
_FUSED = (
    *SIBLINGS,
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("w1", "w3"),
)
_MULTIPLE = 32  # groups want inputs in such multiples; outputs in such multiples fill whole words at any width
_FEW_ROWS = 256  # with fewer outputs other multiples gain nothing: gates with a row for each head


def can_pack(linear: nn.Linear, bits: int) -> bool:
    """Return whether a linear has a size that can be packed with so many bits.

    Formats pack zero points (AWQ: codes, too) along the outputs. Readers want whole words of them: of eight 4-bit ones,
    or sixteen 2-bit ones.
    """
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _row_multiple(linear, bits) == 0


def _row_multiple(linear: nn.Linear, bits: int) -> int:
    return _MULTIPLE if linear.out_features < _FEW_ROWS else max(8, _MULTIPLE // math.gcd(bits, _MULTIPLE))


def packable_widths(blocks: Mapping[str, nn.Module], bits: Mapping[str, int]) -> set[int]:
    """Return the input sizes of all linears in these blocks that can be packed. `bits`: by the name in the model."""
    modules = {f"{block}.{name}": m for block, module in blocks.items() for name, m in module.named_modules()}
    return {m.in_features for name, m in modules.items() if isinstance(m, nn.Linear) and can_pack(m, bits[name])}


def inside(block: str, names: Iterable[str]) -> set[str]:
    """Return the names inside a block of those that are in it."""
    return {name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")}


def split_packable(
    block: nn.Module, groups: list[Group], bits: Mapping[str, int], shared: Container[str] = ()
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that can be packed, and the reason for each linear that stays in float.

    Linears that do not run once in a forward come last, each as a group of its own.

    A linear that cannot be packed keeps those in float that engines run as one with it: they need one scheme for all.
    `bits`: of each linear, by its name in the block. `shared`: names of tensors that other blocks have, too.
    """
    kept, skipped = list[Group](), dict[str, str]()
    calls = Counter(name for group in groups for name in group.linears)
    read = {name for group in groups if group.is_read for name in group.linears}
    routers = routing_linears(block)

    def reason_for(name: str, linear: nn.Linear) -> str:
        if name in read:
            return "the model reads its weight without a call, and a packed linear has none"
        if f"{name}.weight" in shared:
            return "another block has the same weight; llmq quantizes each block alone"
        if name in routers:
            return f"{name} is a router: it is small, and chooses the experts"
        return _unfit(name, linear, bits[name], calls[name])

    for group in groups:
        for odd in group.linears:
            if reason := reason_for(odd, linear_of(block, odd)):
                with_it = dict.fromkeys((odd, *_fused_with(odd, groups)), reason)
                skipped = with_it | skipped
    alone = {name: count for name, count in calls.items() if count > 1 and name not in skipped}
    for group in groups:
        left = tuple(name for name in group.linears if name not in skipped and name not in alone)
        if left == group.linears and f"{group.producer}.weight" not in shared:
            kept.append(group)
        elif left:  # nothing is folded into a norm that also feeds weights in float, or belongs to other blocks
            kept.append(Group(left))
    for name, linear in block.named_modules():
        if isinstance(linear, nn.Linear) and name not in calls:
            if reason := reason_for(name, linear):
                skipped[name] = reason
            else:
                alone[name] = 0
    return kept + [Group((name,), calls=count) for name, count in alone.items()], skipped


def _unfit(name: str, linear: nn.Linear, bits: int, calls: int) -> str:
    """Return why a linear stays in float, or nothing."""
    if calls == 0 and type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, and did not compute what an nn.Linear does"
    if not can_pack(linear, bits):
        size, multiples = f"{linear.out_features}x{linear.in_features}", f"{_row_multiple(linear, bits)}x{_MULTIPLE}"
        return f"{name} is {size}; packed weights need multiples of {multiples}"
    return ""


def _fused_with(odd: str, groups: list[Group]) -> list[str]:
    """Return the linears that engines run as one with this one, or as one kind with it: all experts of a block."""
    group = next(group for group in groups if odd in group.linears)
    if group.expert is None:
        return [name for name in group.linears if are_fused(odd, name)]
    alike = (other for other in groups if other.expert and other.expert.module == group.expert.module)
    return [name for other in alike for name in other.linears]


def are_fused(one: str, other: str) -> bool:
    """Return whether engines run two linears of a block as one matrix."""
    (parent, _, leaf), (other_parent, _, other_leaf) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and any(leaf in fused and other_leaf in fused for fused in _FUSED)


def config_names(
    model: nn.Module, files: ModelFiles, schemes: Mapping[str, _Scheme], carried: Iterable[str] = ()
) -> tuple[dict[str, _Scheme], list[str]]:
    """Return what config.json says of a model's linears: the schemes of packed ones, and the names of the others.

    Both are under the names in the model, where transformers looks, and under those in the files, where engines do.
    `schemes`: by the name in the model. `carried`: names of stored tensors that this model has no place for, but
    another one may have (a classifier).
    """
    others = [name.removesuffix(".weight") for name in carried if name.endswith(".weight")]
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_router(name, m)]
    in_float = [name for name in linears if name not in schemes] + others
    packed = {files.stored_linear(name): scheme for name, scheme in schemes.items()}
    stored = [files.stored_module(name) for name in in_float]
    return {**schemes, **packed}, [*dict.fromkeys([*in_float, *stored])]


def fit_group_size(requested: int, in_features: set[int]) -> int:
    """Return the largest of requested, 128, 64, 32 that divides every layer's input size; -1 (whole rows) always fits.

    The whole model gets one size, because engines fuse layers and formats store one number. Raises RequestError if none
    of them divides.
    """
    if requested == -1:
        return -1
    for size in (requested, *(s for s in (128, 64, 32) if s < requested)):
        if all(width % size == 0 for width in in_features):
            return size
    widths = ", ".join(map(str, sorted(in_features)))
    raise RequestError(f"group size {requested} does not divide the layers' input sizes ({widths}); pass 32, 64 or -1")
