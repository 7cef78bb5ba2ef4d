"""Perplexity and KL against torch's own functions on whole chunks, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from packed import logits, some_tokens
from tiny import save_tiny, tiny_model
from torch.nn.functional import cross_entropy, kl_div, one_hot

from llmq.core.errors import RequestError
from llmq.runtime import evaluation as module
from llmq.runtime.evaluation import EvalConfig, Evaluation, evaluate, evaluate_on_text, logits_of, remembered, score

CHUNKS = some_tokens(3, 71)
TARGETS = 3 * 70


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa", seed=0)


@pytest.fixture(scope="module")
def other():
    return tiny_model("llama-gqa", seed=1, num_hidden_layers=3)


class Fixed:
    """A model that says the same logits whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, use_cache):
        assert use_cache is False
        return SimpleNamespace(logits=self.logits[None])


def log_probabilities(model):
    """[chunks, L - 1, vocabulary] of the next token, in float64."""
    return logits(model, CHUNKS)[:, :-1].double().log_softmax(-1)


def test_perplexity_is_that_of_cross_entropy_on_whole_chunks(model):
    nll = cross_entropy(log_probabilities(model).flatten(0, 1), CHUNKS[:, 1:].flatten(), reduction="sum")
    result = evaluate(model, CHUNKS)
    assert result.nll == pytest.approx(float(nll), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(float(nll) / TARGETS), rel=1e-6)
    assert (result.kl_sum, result.kl) == (None, None)


def test_perplexity_is_that_of_the_models_own_loss(model):
    losses = [model(input_ids=chunk[None], labels=chunk[None]).loss.item() for chunk in CHUNKS]
    assert evaluate(model, CHUNKS).perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-6)


@pytest.mark.parametrize(("chunks", "length"), [(1, 2), (1, 71), (5, 3), (2, 257), (2, 258)])
def test_every_token_of_a_chunk_but_the_first_is_a_target(model, chunks, length):
    ids = some_tokens(chunks, length)
    assert evaluate(model, ids).tokens == chunks * (length - 1)
    # Equal logits for all 384 tokens: every target costs log 384, so the sum counts the targets that were scored.
    flat = evaluate(Fixed(torch.zeros(length, 384)), ids)
    assert flat.nll == pytest.approx(chunks * (length - 1) * math.log(384), rel=1e-6)
    assert flat.perplexity == pytest.approx(384, rel=1e-5)


def test_each_token_is_predicted_from_the_position_before_it():
    chunk = some_tokens(1, 300)
    right = 40 * one_hot(chunk[0].roll(-1), 384).float()
    assert evaluate(Fixed(right), chunk).perplexity == pytest.approx(1, abs=1e-6)
    late = 40 * one_hot(chunk[0], 384).float()
    assert evaluate(Fixed(late), chunk).perplexity > 1e6


def test_chunks_do_not_see_each_other(model):
    alone = [evaluate(model, chunk[None]).nll for chunk in CHUNKS]
    assert evaluate(model, CHUNKS).nll == sum(alone)


@pytest.mark.parametrize("positions", [1, 7, 69, 70, 71])
def test_scoring_in_slices_changes_nothing(model, other, monkeypatch, positions):
    whole = evaluate(model, CHUNKS, logits_of(other))
    monkeypatch.setattr(module, "_POSITIONS", positions)
    sliced = evaluate(model, CHUNKS, logits_of(other))
    assert sliced.nll == pytest.approx(whole.nll, rel=1e-6)
    assert sliced.kl_sum == pytest.approx(whole.kl_sum, rel=1e-6)
    assert sliced.tokens == whole.tokens


def test_kl_of_a_model_with_itself_is_zero(model):
    assert evaluate(model, CHUNKS, logits_of(model)).kl == 0


def test_kl_is_the_divergence_of_the_model_from_the_reference(model, other):
    p, q = log_probabilities(model), log_probabilities(other)
    expected = float(kl_div(p, q, reduction="sum", log_target=True)) / TARGETS
    backwards = float(kl_div(q, p, reduction="sum", log_target=True)) / TARGETS
    result = evaluate(model, CHUNKS, logits_of(other))
    assert expected > 0.1
    assert result.kl == pytest.approx(expected, rel=1e-5)
    assert result.kl != pytest.approx(backwards, rel=1e-3)
    assert result.nll == evaluate(model, CHUNKS).nll


def test_kl_sees_a_small_difference(model):
    tilt = 0.01 * torch.linspace(-1, 1, 384)

    def nearby(i, chunk):
        return logits_of(model)(i, chunk) + tilt

    q = (logits(model, CHUNKS)[:, :-1].double() + tilt).log_softmax(-1)
    expected = float(kl_div(log_probabilities(model), q, reduction="sum", log_target=True)) / TARGETS
    assert 1e-6 < expected < 1e-4
    assert evaluate(model, CHUNKS, nearby).kl == pytest.approx(expected, rel=1e-2)


def test_remembered_logits_give_the_figures_of_the_live_reference(model, other):
    calls = []

    def live(i, chunk):
        calls.append(i)
        return logits_of(other)(i, chunk)

    kept = remembered(live, CHUNKS)
    assert evaluate(model, CHUNKS, kept) == evaluate(model, CHUNKS, logits_of(other))
    assert evaluate(other, CHUNKS, kept).kl == 0
    assert calls == [0, 1, 2]
    assert not kept(0, CHUNKS[0]).requires_grad


def test_half_precision_logits_are_scored_in_float32(model):
    rounded = logits(model, CHUNKS[:1])[0].bfloat16()
    expected = cross_entropy(rounded[:-1].double(), CHUNKS[0, 1:], reduction="sum")
    assert evaluate(Fixed(rounded), CHUNKS[:1]).nll == pytest.approx(float(expected), rel=1e-6)


def test_a_broken_model_has_an_infinite_or_undefined_perplexity_and_breaks_nothing():
    wrong = torch.zeros(71, 384)
    wrong[:, 2] = 1e6
    assert evaluate(Fixed(wrong), CHUNKS[:1]).perplexity == math.inf
    assert math.isnan(evaluate(Fixed(torch.full((71, 384), math.nan)), CHUNKS[:1]).perplexity)
    assert Evaluation(nll=700.0, tokens=1).perplexity == math.exp(700)


def test_progress_goes_to_stderr_and_only_on_request(model, capsys):
    evaluate(model, CHUNKS)
    assert capsys.readouterr() == ("", "")
    perplexity = evaluate(model, CHUNKS, progress=True).perplexity
    out, err = capsys.readouterr()
    assert out == ""
    assert f"perplexity {perplexity:.3f}" in err
    assert "3/3" in err


def test_words_ruled_out_by_both_models_add_nothing_to_the_divergence():
    """-inf logits: what padding of the vocabulary or a masked word looks like."""
    chunks = torch.zeros(1, 3, dtype=torch.int64)
    p, q = torch.tensor([[1.0, 2.0, 0.5]] * 3), torch.tensor([[1.5, 0.0, 0.0]] * 3)
    masked = [torch.cat([logits, torch.full((3, 1), -torch.inf)], dim=1) for logits in (p, q)]
    whole = score(lambda *_: p, chunks, lambda *_: q).kl
    assert whole > 0
    ruled_out = score(lambda *_: masked[0], chunks, lambda *_: masked[1]).kl
    assert abs(ruled_out / whole - 1) < 1e-6  # float32 sums over rows of another length


def test_models_of_different_vocabularies_are_refused(llama, text_file, tmp_path):
    other = save_tiny(tmp_path / "other", vocab_size=390)
    config = EvalConfig(str(llama), str(other), str(text_file), sequence_length=64, limit=1, device="cpu")
    with pytest.raises(RequestError, match="have different vocabularies, so there is no KL"):
        evaluate_on_text(config)


def test_only_as_many_chunks_as_allowed_are_scored(llama, text_file):
    config = EvalConfig(str(llama), str(llama), str(text_file), sequence_length=64, limit=2, device="cpu")
    result, chunks = evaluate_on_text(config)
    assert (chunks, result.tokens, result.kl) == (2, 2 * 63, 0)


@pytest.mark.parametrize(("option", "value", "least"), [("sequence_length", 1, 2), ("limit", 0, 1)])
def test_a_request_for_nothing_is_refused_with_its_value(option, value, least):
    flag = "--" + option.replace("_", "-")
    with pytest.raises(RequestError, match=f"{flag} must be at least {least}; got {value}"):
        EvalConfig("demo", **{option: value})
