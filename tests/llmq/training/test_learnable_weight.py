import pytest
import torch
from packed import assert_same_weight, random_weight, with_real_zeros

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import mlx
from llmq.formats.scheme import Scheme
from llmq.training.learnable_weight import Latent


def exact(weight):
    """Return the weights in float32, as stored codes and scales give them."""
    size = weight.group_size
    scale, zero = (x.float().repeat_interleave(size, 1) for x in (weight.scale, weight.zero))
    return scale * (weight.q.float() - zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_starts_at_the_given_codes_however_far_the_hint_is(bits, symmetric):
    weight = random_weight(3, 64, groups=2, bits=bits, symmetric=symmetric)
    latent = Latent(weight, 100 * torch.randn(3, 64))
    stored = latent.rounded()
    assert torch.equal(stored.q, weight.q)
    assert torch.equal(stored.scale, weight.scale)
    assert torch.equal(stored.zero, weight.zero)
    torch.testing.assert_close(latent(), exact(weight), rtol=0, atol=0)


def test_what_it_computes_is_what_would_be_stored_after_it_has_moved():
    latent = Latent(random_weight(3, 64, groups=2), torch.zeros(3, 64))
    with torch.no_grad():
        latent.V += torch.randn(latent.V.shape, generator=torch.Generator().manual_seed(0)) * 3
        latent.factor *= 1.037
    stored = latent.rounded()
    assert int(stored.q.max()) <= 15
    torch.testing.assert_close(latent(), exact(stored))


def test_gradients_pass_through_the_rounding_but_not_outside_of_the_codes():
    weight = random_weight(1, 32)
    latent = Latent(weight, exact(weight)).requires_grad_()
    with torch.no_grad():
        latent.V[0, 0, :3] = torch.tensor([-0.6, 15.6, 7.3])
    latent().sum().backward()
    scale = latent.scale[0, 0, 0]
    assert latent.V.grad[0, 0, :3].tolist() == [0.0, 0.0, float(scale)]
    codes = latent.V[0, 0].round().clamp(0, 15) - latent.zero[0, 0]
    torch.testing.assert_close(latent.factor.grad[0, 0, 0], (scale * codes).sum())


def test_all_of_a_latent_weight_moves_to_the_device():
    latent = Latent(random_weight(3, 64, groups=2), torch.zeros(3, 64)).to("meta")
    assert latent().device.type == "meta"


@pytest.mark.parametrize("codes", [True, False])
def test_a_product_and_its_gradients_are_those_of_the_dense_weight(codes):
    weight = random_weight(5, 64, groups=2)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for times in (lambda latent: latent.times(x), lambda latent: x @ latent().T):
        latent = Latent(weight, exact(weight) + 0.01, codes).requires_grad_()
        y = times(latent)
        gradients = torch.autograd.grad(y.square().sum(), [x, *latent.parameters()])
        results.append([y, *gradients])
    assert len(results[0]) == (4 if codes else 3)
    for mine, dense in zip(*results, strict=True):
        torch.testing.assert_close(mine, dense)


def test_codes_that_do_not_learn_take_one_byte_each():
    weight = random_weight(5, 64, groups=2)
    latent = Latent(weight, codes=False)
    assert latent.V.dtype == torch.uint8
    assert [name for name, _ in latent.named_parameters()] == ["factor"]
    assert torch.equal(latent.rounded().q, weight.q)
    assert torch.equal(latent(), Latent(weight)())


def test_the_straight_through_gradient_is_the_slope_of_the_rounding_averaged_over_small_shifts():
    """Averaged over shifts by up to half a code, rounding is the identity inside of the codes, and flat far outside."""
    weight = random_weight(1, 32, bits=2)
    c = torch.randn(32, generator=torch.Generator().manual_seed(1))
    shifts = (torch.arange(1000) + 0.5) / 1000 - 0.5

    def smoothed(V):
        codes = (V[:, None] + shifts).round().clamp(0, 3).mean(1)
        return (c * latent.scale[0, 0] * (codes - latent.zero[0, 0])).double()

    latent = Latent(weight).requires_grad_()
    V = torch.linspace(0.5, 2.5, 32)
    V[:2] = torch.tensor([-0.7, 3.7])
    with torch.no_grad():
        latent.V[0, 0] = V
    (latent()[0] * c).sum().backward()
    slope = (smoothed(V + 0.1) - smoothed(V - 0.1)) / 0.2
    torch.testing.assert_close(latent.V.grad[0, 0].double(), slope, rtol=2e-2, atol=1e-4)
    assert latent.V.grad[0, 0, :2].tolist() == [0, 0]


def test_the_gradient_of_a_scale_is_the_slope_at_fixed_codes():
    latent = Latent(random_weight(2, 64, groups=2, dtype=torch.float32)).requires_grad_()
    c = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))

    def value(factor):
        with torch.no_grad():
            latent.factor[1, 0] = factor
            return float((latent().double() * c).sum())

    (latent() * c).sum().backward()
    assert float(latent.factor.grad[1, 0]) == pytest.approx((value(1.01) - value(0.99)) / 0.02, rel=1e-3)


def test_groups_that_are_spread_over_the_row_are_refused():
    weight = random_weight(3, 64, groups=2)
    spread = QuantizedWeight(weight.q, weight.scale, weight.zero, weight.bits, torch.arange(64, dtype=torch.int32) % 2)
    with pytest.raises(CheckpointError, match="desc_act"):
        Latent(spread)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_real_zero_points_start_as_stored_and_move_with_what_would_be_stored(dtype, codes):
    weight = with_real_zeros(random_weight(6, 64, groups=2, bits=2, dtype=dtype))
    latent = Latent(weight, torch.zeros(6, 64) if codes else None, codes)
    assert_same_weight(latent.rounded(), weight)
    torch.testing.assert_close(latent(), weight.dequantize(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        latent.factor *= 1.037
        latent.shift += 0.123
    moved = latent.rounded()
    assert ((moved.zero - weight.zero - 0.123).abs() < 0.01).all()
    torch.testing.assert_close(latent(), moved.dequantize(), rtol=1e-6, atol=1e-7)
    assert_same_weight(mlx_again(moved), moved)


def mlx_again(weight):
    scheme = Scheme(weight.bits, weight.group_size, False)
    return mlx.decode("linear", mlx.encode("linear", weight, scheme), scheme)


def test_the_gradients_of_a_real_zero_point_are_the_slope_at_fixed_codes_in_products_too():
    latent = Latent(with_real_zeros(random_weight(2, 64, groups=2, dtype=torch.float32))).requires_grad_()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))

    def value(shift):
        with torch.no_grad():
            latent.shift[1, 0] = shift
            return float(latent.times(x).double().square().sum())

    for y in (latent.times(x), x @ latent().T):
        (slope,) = torch.autograd.grad(y.square().sum(), latent.shift)
        assert float(slope[1, 0]) == pytest.approx((value(0.01) - value(-0.01)) / 0.02, rel=1e-3)
        value(0.0)
