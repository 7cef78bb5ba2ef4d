"""Which linears can be packed, in groups of which size, and which ones stay in float."""

from collections.abc import Container, Iterable, Mapping
from typing import TypeVar

from torch import nn

from llmq.core.errors import RequestError
from llmq.models.block_structure import SIBLINGS, Group, linear_of
from llmq.models.model_files import ModelFiles

_FUSED = (*SIBLINGS, ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))  # the last two of linear attention
_Scheme = TypeVar("_Scheme")
# Packed formats and the engines' kernels want both sides of a weight in multiples of this.
_MULTIPLE = 32


def packable_widths(blocks: list[nn.Module]) -> set[int]:
    """Return the input sizes of all linears in these blocks that can be packed."""
    linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    return {linear.in_features for linear in linears if _packable(linear)}


def _packable(linear: nn.Linear) -> bool:
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0


def split_packable(block: nn.Module, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that can be packed, and the reason for each linear that stays in float.

    A linear of an odd size keeps those in float that engines run as one with it: they need one scheme for all of them.
    """
    kept, skipped = list[Group](), dict[str, str]()
    for group in groups:
        for odd in group.linears:
            if not _packable(linear_of(block, odd)):
                rows, columns = linear_of(block, odd).weight.shape
                reason = f"{odd} is {rows}x{columns}; packed weights need multiples of {_MULTIPLE}"
                with_it = dict.fromkeys((odd, *(name for name in group.linears if _are_fused(odd, name))), reason)
                skipped = with_it | skipped
        left = tuple(name for name in group.linears if name not in skipped)
        if left == group.linears:
            kept.append(group)
        elif left:  # nothing is folded into a norm that also feeds weights in float
            kept.append(Group(left))
    seen = {name for group in groups for name in group.linears}
    idle = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and name not in seen]
    skipped.update(dict.fromkeys(idle, "it did not run on the first calibration sequence"))
    return kept, skipped


def _are_fused(one: str, other: str) -> bool:
    """Return whether engines run two linears of a block as one matrix."""
    (parent, _, leaf), (other_parent, _, other_leaf) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and any(leaf in fused and other_leaf in fused for fused in _FUSED)


def left_in_float(model: nn.Module, packed: Container[str], carried: Iterable[str] = ()) -> list[str]:
    """Return the names of a model's linears that are not packed.

    `carried`: names of stored tensors that this model has no place for, but another one may have (a classifier).
    """
    others = [name.removesuffix(".weight") for name in carried if name.endswith(".weight")]
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed] + others


def with_stored_names(
    files: ModelFiles | None, schemes: Mapping[str, _Scheme], in_float: list[str]
) -> tuple[dict[str, _Scheme], list[str]]:
    """Return schemes of packed linears and names of linears in float, also under the names in the files.

    transformers looks for a linear under its name in the model, engines under that in the files.
    """
    if files is None:
        return dict(schemes), in_float
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
