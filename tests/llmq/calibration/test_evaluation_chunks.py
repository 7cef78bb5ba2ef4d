"""Text for evaluation: where chunks begin, and that no more of a long text is tokenized than is needed."""

import pytest
import torch
from counting import BOS, Counting
from tiny import tiny_model, tiny_tokenizer

from llmq.calibration.texts import check_tokens, evaluation_chunks, read_text
from llmq.core.errors import RequestError


def test_every_chunk_begins_with_bos_and_no_token_is_left_out():
    chunks = evaluation_chunks(Counting(bos=BOS), "x" * 95, 10)
    assert chunks[:, 0].tolist() == [BOS] * 10
    assert chunks[:, 1:].flatten().tolist() == list(range(1000, 1090))


def test_the_customary_way_has_bos_at_the_start_of_the_text_only():
    chunks = evaluation_chunks(Counting(bos=BOS), "x" * 95, 10, bos=False)
    assert chunks.flatten().tolist() == [BOS, *range(1000, 1089)]


@pytest.mark.parametrize("bos", [None, BOS])
def test_only_the_beginning_of_a_long_text_is_tokenized(bos):
    seen = []

    class Tokenizer(Counting):
        def __call__(self, text, verbose=True):
            seen.append(len(text))
            return super().__call__(text)

    text = "x" * 1_000_000
    assert torch.equal(evaluation_chunks(Tokenizer(bos), text, 10, 3), evaluation_chunks(Counting(bos), text, 10)[:3])
    assert max(seen) < 1000


def test_a_text_of_long_tokens_is_tokenized_whole_after_all():
    class Tokenizer(Counting):
        def __call__(self, text, verbose=True):
            return super().__call__(text[::100])

    assert evaluation_chunks(Tokenizer(), "x" * 100_000, 10, 3).shape == (3, 10)


def test_text_that_the_model_writes_is_no_text_to_evaluate_on():
    with pytest.raises(RequestError, match="for calibration only"):
        read_text("self", evaluation=True)


def test_a_token_beyond_the_embeddings_is_refused_with_both_numbers():
    model, tokenizer = tiny_model("llama-gqa", vocab_size=258), tiny_tokenizer()
    tokenizer.add_tokens(["<|user|>"])
    check_tokens(model, torch.tensor(tokenizer("a b")["input_ids"]))
    with pytest.raises(RequestError, match="gives token 258, but the model has embeddings for 258 tokens only"):
        check_tokens(model, torch.tensor(tokenizer("<|user|> a")["input_ids"]))
