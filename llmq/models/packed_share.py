"""How much of what the matmuls of decoder blocks read is packed, and which kinds of weights stay in float."""

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from torch import nn

from llmq.models.routers import routing_linears

_ENOUGH = 0.9  # a smaller share is worth a warning
_NAMED = 3  # kinds that a warning names
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PackedShare:
    """The share of the blocks' matmul weights that is packed."""

    share: float = 1.0
    in_float: dict[str, float] = field(default_factory=dict[str, float])
    """The share of each kind of weight that stays in float, the largest first: experts.gate_up_proj, …"""
    has_experts: bool = False  # whether experts that are no linears stay in float

    def __str__(self) -> str:
        if self.share >= _ENOUGH:
            return f"{self.share:.1%} of the blocks' matmul weights are packed"
        largest = [f"{kind} {share:.0%}" for kind, share in self.in_float.items() if share >= 0.005][:_NAMED]
        kinds = ", ".join(largest) + "; the experts stay in float: llmq does not quantize them yet" * self.has_experts
        return f"warning: only {self.share:.1%} of the blocks' matmul weights are packed; in float: {kinds}"


def packed_share(model: nn.Module, blocks: Iterable[str], packed: Container[str]) -> PackedShare:
    """Return the share of the matmul weights of these blocks. `packed`: the names of packed linears in the model."""
    total, left, has_experts = 0, Counter[str](), False
    for block in blocks:
        module = model.get_submodule(block)
        for name, count in matmul_weights(module).items():
            total += count
            linear = name.removesuffix(".weight")
            if f"{block}.{linear}" not in packed:
                left[".".join([part for part in linear.split(".") if not part.isdigit()][-2:])] += count
                has_experts |= _is_expert(module, name)
    kinds = {kind: count / total for kind, count in left.most_common()}
    return PackedShare(1 - left.total() / total if total else 1.0, kinds, has_experts)


def matmul_weights(block: nn.Module) -> dict[str, int]:
    """Return the size of each parameter of a block that matmuls read, by its name.

    These are the weights of linears, the matrices of experts, and other stacks of matrices. Convolutions, embeddings,
    norms, biases, routers and gates with one output are not counted.
    """
    sizes: dict[str, int] = {}
    routers = routing_linears(block)
    for name, parameter in block.named_parameters():
        module = block.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            counts = name.endswith("weight") and module.out_features > 1 and name.removesuffix(".weight") not in routers
        elif isinstance(module, (*_CONVOLUTIONS, nn.Embedding)) or name.endswith("bias"):
            counts = False
        else:
            is_stack = parameter.ndim >= 3 and sum(size > 1 for size in parameter.shape) >= 2
            counts = is_stack or (parameter.ndim >= 2 and _is_expert(block, name))
        if counts:
            sizes[name] = parameter.numel()
    return sizes


def _is_expert(block: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to experts that are no linears."""
    parent = name.rpartition(".")[0]
    module = block.get_submodule(parent)
    return not isinstance(module, nn.Linear) and "expert" in f"{parent} {type(module).__name__}".lower()
