import torch

from llmq.training.fake_quantization import per_token


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


def test_the_gradient_is_the_slope_of_the_rounding_averaged_over_shifts_of_half_a_step():
    x = torch.tensor([[0.5, -0.123, 0.777, 1.27]], requires_grad=True)  # the last one sets the scale to 0.01
    per_token(x).sum().backward()
    shifts = ((torch.arange(1000) + 0.5) / 1000 - 0.5) * 0.01

    def smoothed(i, change):
        with torch.no_grad():
            moved = x.repeat(1000, 1)
            moved[:, i] += change + shifts
            return per_token(moved)[:, i].mean()

    for i in range(3):
        slope = (smoothed(i, 0.002) - smoothed(i, -0.002)) / 0.004
        torch.testing.assert_close(x.grad[0, i], slope, rtol=2e-2, atol=0)
