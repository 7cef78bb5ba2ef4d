"""Small decoder blocks for tests, and hidden states to enter them."""

import torch
from torch import nn

from llmq.calibration.block_runner import Block, Compute

CPU = Compute(torch.device("cpu"))


class TwoLinears(nn.Module):
    """hidden -> a -> relu -> b"""

    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return self.b(self.a(hidden).relu())


class Residual(nn.Module):
    """hidden + b(relu(a(norm(hidden)))), as decoder blocks have it."""

    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return hidden + self.b(self.a(self.norm(hidden)).relu())


def hidden_states(batches=3, width=64):
    """Return random micro-batches of 100 tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 50, width, generator=generator) for _ in range(batches)]


def block_of(hidden, held_out_from, width=64, inner=320):
    """Return a block of two linears with these hidden states."""
    torch.manual_seed(0)
    return Block("block", TwoLinears(width, inner), hidden, held_out_from, ((), {}), CPU)


def paired_block():
    """Return a block that the original model runs through too, and the hidden states of the original model."""
    torch.manual_seed(0)
    hidden = hidden_states()
    original = [h + 0.1 * torch.randn_like(h) for h in hidden]
    return Block("block", Residual(64, 96), hidden, 2, ((), {}), CPU, list(original)), original
