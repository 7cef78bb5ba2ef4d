import pytest
import torch

from llmq.training.fake_quantization import MOST, ActivationQuantizer, per_token


def test_each_token_is_rounded_to_255_steps_over_its_own_range():
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 100])[:, None]
    y, step = per_token(x), x.abs().amax(-1, keepdim=True) / 127
    assert ((y - x).abs() <= step / 2 * 1.0001).all()
    assert len((y / step).round()[0, 1].unique()) > 30
    torch.testing.assert_close(y / step, (y / step).round(), rtol=0, atol=1e-4)
    assert torch.equal(y.abs().amax(-1), per_token(y).abs().amax(-1))


def test_a_token_of_zeros_stays_zero_and_the_dtype_stays():
    assert torch.equal(per_token(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert per_token(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_pass_the_rounding_of_tokens_as_they_are():
    x, c = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    (per_token(x) * c).sum().backward()
    torch.testing.assert_close(x.grad, c)


def test_a_static_range_cuts_off_and_its_gradients_are_the_slopes_there():
    """Inside of the range the slope of the rounding, averaged over shifts of half a step, is 1; outside it is 0."""
    quantizer = ActivationQuantizer(0.01).requires_grad_()
    x = torch.tensor([0.5, -0.123, 1.3, -2.0], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y.detach(), torch.tensor([0.5, -0.12, 1.27, -1.27]))
    y.sum().backward()
    shifts = ((torch.arange(1000) + 0.5) / 1000 - 0.5) * 0.01
    with torch.no_grad():
        above, below = (quantizer(x[:, None] + d + shifts).mean(1) for d in (0.002, -0.002))
    torch.testing.assert_close(x.grad, (above - below) / 0.004, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("value", "sign"), [(1.3, 1), (-2.0, -1)])
def test_a_static_range_learns_from_what_it_cuts_off(value, sign):
    quantizer = ActivationQuantizer(0.01).requires_grad_()
    quantizer(torch.tensor([value])).sum().backward()
    assert float(quantizer.scale.grad) == pytest.approx(sign * MOST / MOST**0.5)
