"""What a block returns besides the output of its experts."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.models.experts import layout_of

# Largest relative difference of two sums that are taken as equal, in float32 and in others. bfloat16 rounds to 0.004.
_FINE, _COARSE = 1e-3, 0.02


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

    It is so if nothing but sums follows: no norm, and no factor. Where scores come before the experts (Llama 4), or
    some experts only pass on their input (LongCat), the answer is no. `output` and `end`: what the experts and the
    block returned when `run(hidden)` ran it. The block runs once more, with noise in the place of the output.
    """
    layout = layout_of(experts)
    has_norm = getattr(experts, "has_post_expert_norm", False)  # on each expert's output
    if layout is None or layout.scored or layout.passes or has_norm or output.numel() != end.numel():
        return False
    noise = torch.randn(end.shape, generator=torch.Generator().manual_seed(0)).to(end.device) * end.float().std()
    noise = noise.to(output)
    with returning(experts, lambda X: noise.clone().view_as(X)):  # a copy: the block may add to it in place
        changed = run(hidden).float() - end.float()
    expected = noise.float() - output.float().view_as(end)
    rounding = _FINE if end.dtype == torch.float32 else _COARSE
    return bool((changed - expected).norm() <= rounding * expected.norm())
