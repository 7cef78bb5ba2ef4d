"""Attention in strips is causal attention: torch's own, and softmax in float64."""

from functools import partial

import pytest
import torch
from problems import threads
from torch.nn import functional

from llmq.calibration import causal_attention as module
from llmq.calibration.causal_attention import causal_attention, causal_in_strips

# batch, heads, heads of keys, tokens, width, width of values. Strips have 256 tokens.
SHAPES = [(1, 1, 1, 1, 8, 8), (2, 9, 3, 300, 64, 64), (1, 4, 4, 512, 16, 16), (3, 4, 1, 255, 32, 24)]


def heads(batch, count, kv_count, tokens, width, out):
    """Q, K, V [batch, heads, tokens, width] as models make them: transposed views."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, n, size) for n, size in ((count, width), (kv_count, width), (kv_count, out))]
    return [torch.randn(shape, generator=generator).transpose(1, 2).bfloat16() * 2 for shape in shapes]


def in_float64(Q, K, V, scale):
    shared = Q.shape[1] // K.shape[1]
    K, V = (tensor.double().repeat_interleave(shared, 1) for tensor in (K, V))
    S = Q.double() @ K.mT * scale
    hidden = torch.ones(S.shape[-2:], dtype=torch.bool).triu(1)
    return S.masked_fill(hidden, -torch.inf).softmax(-1) @ V


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_are_those_of_float64_but_for_the_rounding_of_bfloat16(shape, scale):
    Q, K, V = heads(*shape)
    exact = in_float64(Q, K, V, scale or Q.shape[-1] ** -0.5)
    with torch.no_grad():
        theirs = functional.scaled_dot_product_attention(Q, K, V, is_causal=True, scale=scale, enable_gqa=True)
        ours = causal_attention(Q, K, V, scale)
    assert (ours - exact).norm() / exact.norm() < 4e-3  # the last bit of bfloat16 is 2^-8
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("scores", [1, 1 << 30])
def test_how_many_heads_are_computed_together_changes_nothing(scores, monkeypatch):
    Q, K, V = heads(2, 9, 3, 300, 64, 64)
    expected = causal_attention(Q, K, V)
    monkeypatch.setattr(module, "_SCORES", scores)
    assert torch.equal(causal_attention(Q, K, V), expected)


def test_the_number_of_threads_and_the_other_sequences_change_nothing():
    Q, K, V = heads(3, 9, 3, 512, 64, 64)
    expected = causal_attention(Q, K, V)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(causal_attention(Q, K, V), expected)
    assert torch.equal(causal_attention(Q[1:2], K[1:2], V[1:2]), expected[1:2])


def test_a_token_that_is_not_finite_reaches_no_sequence_but_its_own():
    Q, K, V = heads(2, 4, 2, 300, 16, 16)
    expected = causal_attention(Q, K, V)
    K[0, :, 270] = torch.nan
    found = causal_attention(Q, K, V)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, :, :256], expected[0, :, :256])
    assert found[0, :, 270:].isnan().all()


def usual_and_in_strips(*args, **kwargs):
    usual = functional.scaled_dot_product_attention(*args, **kwargs)
    with causal_in_strips():
        return usual, functional.scaled_dot_product_attention(*args, **kwargs)


@torch.no_grad()
def test_within_the_context_models_attend_in_strips():
    Q, K, V = heads(2, 9, 3, 300, 64, 64)
    before, expected = functional.scaled_dot_product_attention, causal_attention(Q, K, V, 0.1)
    as_autocast_rounds = [tensor.float() for tensor in (Q, K, V)]
    with causal_in_strips():
        attention = partial(functional.scaled_dot_product_attention, scale=0.1, enable_gqa=True)
        assert torch.equal(attention(Q, K, V, attn_mask=None, is_causal=True), expected)
        assert torch.equal(attention(Q, K, V, None, 0.0, True), expected)
        assert torch.equal(attention(*as_autocast_rounds, is_causal=True), expected)
    assert functional.scaled_dot_product_attention is before


OTHERS = {
    "a mask": lambda Q: {"attn_mask": torch.ones(Q.shape[2], Q.shape[2], dtype=torch.bool).triu()},
    "not causal": lambda Q: {"is_causal": False},
    "dropout": lambda Q: {"is_causal": True, "dropout_p": 1.0},
}


@torch.no_grad()
@pytest.mark.parametrize("what", OTHERS)
def test_other_attention_is_torchs(what):
    Q, K, V = heads(2, 4, 4, 300, 16, 16)
    usual, found = usual_and_in_strips(Q, K, V, **OTHERS[what](Q))
    assert torch.equal(usual, found)
    assert not torch.equal(usual, causal_attention(Q, K, V))


@torch.no_grad()
def test_other_shapes_are_torchs():
    Q, K, V = heads(2, 4, 4, 300, 16, 16)
    for q, k, v in ((Q[:, :, :8], K, V), (Q[0], K[0], V[0]), (Q, K[:1], V[:1])):
        usual, found = usual_and_in_strips(q, k, v, is_causal=True)
        assert torch.equal(usual, found)


def test_what_needs_gradients_is_torchs():
    Q, K, V = heads(1, 4, 4, 300, 16, 16)
    _usual, found = usual_and_in_strips(Q.requires_grad_(), K, V, is_causal=True)
    found.float().sum().backward()
    assert Q.grad.any()
