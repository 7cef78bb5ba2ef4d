import pytest
import torch
from torch.nn.functional import kl_div

from llmq.training import kl_loss as module
from llmq.training.kl_loss import divergence


def plain(given, wanted):
    log_q, log_p = (each.log_softmax(-1).flatten(0, -2) for each in (given, wanted))
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 3, 11), (5, 1, 31)])
@pytest.mark.parametrize("numbers", [1, 23, 1 << 20])
def test_it_and_its_gradient_are_what_autograd_finds_however_it_is_cut(shape, numbers, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", numbers)
    given, wanted = torch.randn(2, *shape) * 3
    found, expected = given.clone().requires_grad_(), given.clone().requires_grad_()
    loss, reference = divergence(found, wanted), plain(expected, wanted)
    torch.testing.assert_close(loss, reference)
    (3 * loss).backward()
    (3 * reference).backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-5)


def test_words_that_both_rule_out_count_for_nothing():
    given, wanted = torch.randn(2, 4, 9)
    there = divergence(given, wanted)
    ruled_out = torch.full((4, 3), -torch.inf)
    more = torch.cat([given, ruled_out], 1).requires_grad_()
    loss = divergence(more, torch.cat([wanted, ruled_out], 1))
    loss.backward()
    torch.testing.assert_close(loss, there)
    assert (more.grad[:, 9:] == 0).all()


def test_logits_in_bfloat16_are_summed_in_float32_and_get_gradients_of_their_own_kind():
    given, wanted = torch.randn(2, 8, 1000).bfloat16()
    loss = divergence(given.requires_grad_(), wanted)
    loss.backward()
    torch.testing.assert_close(loss, plain(given.float(), wanted.float()))
    assert given.grad.dtype == torch.bfloat16


def test_a_model_compared_with_itself_is_at_zero():
    logits = torch.randn(3, 5, 17)
    assert float(divergence(logits, logits)) == 0.0
