"""Activations as an engine with 8-bit matmuls sees them: rounded to integers, and back.

    Q(x) = s · round(x / s),    s = max|x| / 127 of each token

vLLM computes the same scales (its dynamic int8 kernel, 2026). The gradient passes the rounding as if it was the
identity (straight through: Bengio et al., arXiv 1308.3432); no value is cut off.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_MOST = 127  # the largest code; -128 is not used


def per_token(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
    """Return x with each token rounded to 255 steps over its range, in the dtype of x."""
    exact = x.detach().float()
    scale = (exact.abs().amax(-1, keepdim=True) / _MOST).clamp(min=torch.finfo(torch.float32).tiny)  # zeros stay zeros
    rounded = (exact / scale).round_().mul_(scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded
