"""It is told apart whether a block adds the output of its experts to the rest, or makes something else of it."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llmq.models.block_structure import find_groups
from llmq.models.experts import expert_of, experts_to_linears
from llmq.models.experts_apart import returning

WIDTH = 32


class Mixture(nn.Module):
    """A norm, four experts beside a shared one, and what `after` makes of their sum."""

    def __init__(self, after):
        super().__init__()
        config = MixtralConfig(hidden_size=WIDTH, intermediate_size=48, num_local_experts=4)
        config._experts_implementation = "eager"
        self.norm, self.mlp, self.shared = nn.LayerNorm(WIDTH), MixtralSparseMoeBlock(config), nn.Linear(WIDTH, WIDTH)
        experts_to_linears(self)
        self.mlp.experts.to_empty(device="cpu")
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.after, self.last_norm = after, nn.LayerNorm(WIDTH)
        self.requires_grad_(False)

    def forward(self, hidden):
        X = self.norm(hidden)
        return self.after(self, hidden, self.mlp(X), self.shared(X))


AFTER = {
    "added to the stream": (lambda block, hidden, own, shared: hidden + own, True),
    "added to a shared expert's": (lambda block, hidden, own, shared: hidden + (own + shared), True),
    "added in place": (lambda block, hidden, own, shared: hidden + own.add_(shared), True),
    "times nearly 1": (lambda block, hidden, own, shared: hidden + 1.05 * own, False),
    "through a norm": (lambda block, hidden, own, shared: hidden + block.last_norm(own + shared), False),
    "times a factor": (lambda block, hidden, own, shared: hidden + 0.5 * own, False),
    "in another shape": (lambda block, hidden, own, shared: own[..., :8], False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AFTER)
def test_only_the_last_linear_of_an_expert_is_added_and_only_if_nothing_but_sums_follows(name, dtype):
    torch.manual_seed(0)
    after, expected = AFTER[name]
    block = Mixture(after).to(dtype)
    hidden = 10 * torch.randn(1, 60, WIDTH, dtype=dtype)  # beside it the output of the experts is small
    groups = [group for group in find_groups(block, block, hidden) if group.expert is not None]
    assert [group.is_added for group in groups] == [False, expected] * 4


def test_no_expert_runs_while_something_else_is_returned():
    block = Mixture(AFTER["added to the stream"][0])
    hidden, calls = torch.randn(1, 6, WIDTH), []
    for number in range(4):
        expert_of(block.mlp.experts, number).up_proj.register_forward_hook(lambda *_: calls.append(1))
    with returning(block.mlp.experts, torch.zeros_like):
        assert torch.equal(block(hidden), hidden)
    assert not calls
    assert not torch.equal(block(hidden), hidden)
    assert calls
