import torch
from torch import nn

from llmq.training.fake_quantization import per_tensor
from llmq.training.input_range import InputRange, input_scales


def test_all_tokens_are_rounded_to_the_same_steps_and_cut_off_at_the_ends():
    x = torch.tensor([[0.26, -0.26, 63.4, 64.0], [-64.0, -64.6, 0.24, 0.0]])
    expected = torch.tensor([[0.5, -0.5, 63.5, 63.5], [-64.0, -64.0, 0.0, 0.0]])
    assert torch.equal(per_tensor(x, torch.tensor([0.5])), expected)
    assert per_tensor(x.bfloat16(), torch.tensor([0.5])).dtype == torch.bfloat16


def test_gradients_pass_where_nothing_is_cut_off_and_the_scale_gets_that_of_lsq():
    x = torch.tensor([3.2, -1.6, 200.0, -300.0], requires_grad=True)
    scale, c = torch.ones(1, requires_grad=True), torch.tensor([0.5, 2.0, 3.0, 7.0])
    (per_tensor(x, scale) * c).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0.5, 2.0, 0.0, 0.0]
    by_hand = 0.5 * (3 - 3.2) + 2 * (-2 + 1.6) + 3 * 127 + 7 * -128
    torch.testing.assert_close(scale.grad, torch.tensor([by_hand]))


def test_the_slopes_are_those_of_the_rounding_averaged_over_shifts_of_a_step():
    """Moving the input by up to half a step either way smooths the steps. Then differences can be taken."""
    shifts = (torch.arange(4000) + 0.5) / 4000 - 0.5

    def smoothed(value, scale):
        return per_tensor(value + shifts * scale, torch.tensor([scale])).mean()

    for value in (30.3, 140.0):
        x, scale = torch.full((4000,), value) + shifts, torch.ones(1, requires_grad=True)
        x.requires_grad_()
        per_tensor(x, scale).mean().backward()
        of_x = (smoothed(value + 0.5, 1.0) - smoothed(value - 0.5, 1.0)) / 1.0
        of_scale = (smoothed(value, 1.05) - smoothed(value, 0.95)) / 0.1
        torch.testing.assert_close(x.grad.sum(), of_x, rtol=0.01, atol=0.01)
        torch.testing.assert_close(scale.grad[0], of_scale, rtol=0.02, atol=0.05)


class Block(nn.Module):
    """Two linears over one input, and one over another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, input_ids, use_cache):
        x = torch.randn(*input_ids.shape, 8, generator=torch.Generator().manual_seed(int(input_ids[0, 0])))
        x[0, 0, 0] = 30.0
        return self.o(self.q(x) + self.k(x))


def test_linears_over_one_input_share_the_scale_with_the_least_error():
    block, seen = Block(), []
    linears = dict(block.named_children())
    block.q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = input_scales(block, linears, [torch.full((1, 64), i) for i in range(3)])
    assert [names for names, _ in found] == [["q", "k"], ["o"]]
    x, best = torch.cat(seen[:3]), torch.tensor([found[0][1]])

    def error(scale):
        return float((per_tensor(x, scale) - x).square().sum())

    assert error(best) <= min(error(best * change) for change in (0.8, 1.25))
    assert len(block.q._forward_pre_hooks) == 1  # that of this test


def test_a_linear_that_no_token_reaches_has_no_scale():
    block, ids = Block(), torch.zeros(1, 4, dtype=torch.int64)
    found = input_scales(block, {"q": block.q, "unused": nn.Linear(8, 8)}, [ids])
    assert [names for names, _ in found] == [["q"]]


class Twice(nn.Module):
    """Runs a linear twice on the same tensor, with another one between, and once on no tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, use_cache):
        x = torch.ones(*input_ids.shape, 8)
        self.b(self.a(x))
        self.a(x[:, :0])
        return self.a(x)


def test_a_linear_that_runs_twice_and_one_without_tokens_are_measured():
    twice = Twice()
    found = input_scales(twice, dict(twice.named_children()), [torch.zeros(1, 4, dtype=torch.int64)])
    assert [names for names, _ in found] == [["a"], ["b"]]
    assert 0 < found[0][1] <= 1 / 127 * 1.001


def test_a_factor_that_changes_its_sign_leaves_the_scale_above_0():
    shared, x = InputRange(torch.tensor([0.5])), torch.tensor([[0.2, 10.3, -40.0, 90.0]])
    expected = shared(x)
    with torch.no_grad():
        shared.factor.neg_()
    assert float(shared.rounded()) == 0.5
    assert torch.equal(shared(x), expected)


def test_the_stored_scale_is_the_one_that_is_used():
    shared, linear = InputRange(torch.tensor([0.5], dtype=torch.bfloat16)), nn.Linear(4, 4, bias=False)
    shared.goes_before(linear)
    with torch.no_grad():
        shared.factor.fill_(1.001)
    x = torch.tensor([[0.2, 10.3, -40.0, 90.0]])
    assert shared.rounded().dtype == torch.bfloat16
    torch.testing.assert_close(linear(x), per_tensor(x, shared.rounded().float()) @ linear.weight.T)
