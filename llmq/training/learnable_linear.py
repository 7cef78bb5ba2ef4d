"""A linear layer whose quantized weight learns, and whose inputs may be quantized as an engine would quantize them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.training.fake_quantization import per_token
from llmq.training.learnable_weight import Latent


class LearnableLinear(nn.Module):
    """y = Q(x) Ŵᵀ + b. It takes the place of a packed linear while a model is trained.

    Args:
        latent: the weight.
        bias: [out] or None; it does not learn unless it is told to.
        rounds_inputs: whether x is rounded to 8 bits first, token by token.
    """

    def __init__(self, latent: Latent, bias: Tensor | None, rounds_inputs: bool = False) -> None:
        super().__init__()
        self.latent, self.rounds_inputs = latent, rounds_inputs
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.rounds_inputs:
            x = per_token(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.latent.times(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)
