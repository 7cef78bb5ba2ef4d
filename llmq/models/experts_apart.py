"""What a block returns besides the output of its experts."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.models.experts import layout_of

# Largest relative difference of two sums that are taken as equal; bfloat16 rounds to 0.004, and several sums add up.
_ROUNDING = 0.05


@contextmanager
def returning(module: Any, output: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Let an experts module run no expert, and return `output` of what enters it. Hooks see its call as ever."""
    forward = module.forward
    module.forward = lambda X, *_: output(X)
    try:
        yield
    finally:
        module.forward = forward


def is_added(
    experts: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor, output: Tensor, end: Float[Tensor, "*n out"]
) -> bool:
    """Return whether a block returns the output of its experts plus something that does not depend on it.

    It is so if nothing but sums follows: no norm, and no factor. `output` and `end`: what the experts and the block
    returned when `run(hidden)` ran it. The block runs once more, with noise in the place of the output.
    """
    layout = layout_of(experts)
    if layout is None or layout.scored or output.numel() != end.numel():
        return False
    noise = torch.randn(end.shape, generator=torch.Generator().manual_seed(0)).to(end.device) * end.float().std()
    with returning(experts, lambda X: noise.to(output).view_as(X)):
        changed = run(hidden).float() - end.float()
    expected = noise - output.float().view_as(end)
    return bool((changed - expected).norm() <= _ROUNDING * expected.norm())
