"""Gaps of a text are filled with words, and nothing else of it changes."""

import json
import re
import shutil
import string

import pytest
from commands import run_here
from fill_gaps import FillConfig, fill, pieces_of, tokens_of
from forked import forking
from transformers import AutoModelForCausalLM, FalconConfig

from llmq.core.errors import RequestError
from llmq.models.model_source import ModelSource

LINES = [
    f" The {name} of <unk> , <unk> <unk> and <unk> is a ( <unk> ) thing . \n" for name in ("lobster", "ship", "moon")
]


@pytest.fixture
def spaced(llama, tmp_path):
    """A tiny model with tokens for a space and a letter, as real tokenizers have them for whole words."""
    model = shutil.copytree(llama, tmp_path / "spaced")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = [["Ġ", letter] for letter in string.ascii_lowercase]
    known = tokenizer["model"]["vocab"]
    known |= {f"Ġ{letter}": len(known) + 8 + i for i, letter in enumerate(string.ascii_lowercase)}
    path.write_text(json.dumps(tokenizer))
    return model


def test_each_gap_gets_a_word_and_the_rest_stays_as_it_is(spaced, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "new.txt"
    text.write_text("".join(LINES) * 20 + " The end <unk>")
    with forking():
        done = run_here("fill_gaps", "--model", spaced, "--text", text, "--output", output)
    assert done.returncode == 0, done.stderr
    pattern = re.escape(text.read_text()).replace(re.escape(" <unk>"), r" [A-Za-z]\S*")
    assert re.fullmatch(pattern, output.read_text())


def test_pieces_are_whole_lines():
    assert len(pieces_of("".join(LINES) * 99)) > 5
    assert "".join(pieces_of("".join(LINES) * 99)) == "".join(LINES) * 99
    assert all(piece.endswith("\n") for piece in pieces_of("".join(LINES) * 99))


def test_a_gap_takes_the_space_before_it(llama):
    tokenizer = ModelSource(str(llama)).tokenizer
    plain = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("a big", " dog")]
    assert tokens_of("a big <unk> dog<unk>", "<unk>", tokenizer) == [*plain[0], -1, *plain[1], -1]


def test_a_text_without_gaps_and_a_tokenizer_without_words_are_refused(llama, text_file, tmp_path):
    with pytest.raises(RequestError, match="has no '<unk>'"):
        fill(FillConfig(text_file, tmp_path / "new.txt", str(llama)))
    text_file.with_name("file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        fill(FillConfig(text_file, text_file.with_name("file") / "new.txt", str(llama), gap="e"))
    with pytest.raises(RequestError, match="has no tokens that begin a word"):
        fill(FillConfig(text_file, tmp_path / "new.txt", str(llama), gap="e"))
    assert not (tmp_path / "new.txt").exists()


def test_a_model_without_a_cache_of_fixed_size_is_refused(spaced, text_file, tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(FalconConfig(**sizes, alibi=True)).save_pretrained(spaced)
    with pytest.raises(RequestError, match="FalconForCausalLM has no cache of fixed size"):
        fill(FillConfig(text_file, tmp_path / "new.txt", str(spaced), gap="e"))
    assert not (tmp_path / "new.txt").exists()
