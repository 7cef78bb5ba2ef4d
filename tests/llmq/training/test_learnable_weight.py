import pytest
import torch
from packed import random_weight

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
