"""Text becomes sequences of fixed length: seeded, evenly spread, unpadded, and the held-out ones kept apart."""

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch
from counting import BOS, Counting
from tiny import some_text, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from llmq.calibration.texts import evaluation_chunks, hold_out, read_text, tokenize, windows
from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Calibration


def settings(text, samples=20, length=16, seed=0):
    return Calibration(str(text), samples, length, seed)


def text_of(tmp_path, letters, name="text.txt"):
    path = tmp_path / name
    path.write_text("x" * letters)
    return path


def calibration_tokens(tokenizer, settings):
    return hold_out(windows(tokenizer, settings))


def in_order(tokens):
    """All windows by position in the text."""
    both = torch.cat([tokens.train, tokens.held_out])
    return both[both[:, -1].argsort()]


def test_windows_have_the_asked_shape_and_are_pieces_of_the_text_without_padding(text_file):
    tokenizer = tiny_tokenizer()
    tokens = calibration_tokens(tokenizer, settings(text_file, samples=30, length=64))
    assert tokens.train.shape == (27, 64)
    assert tokens.held_out.shape == (3, 64)
    assert tokens.train.dtype == tokens.held_out.dtype == torch.int64
    windows = [*tokens.train, *tokens.held_out]
    assert not any((window == tokenizer.pad_token_id).any() for window in windows)
    text = text_file.read_text()
    assert all(tokenizer.decode(window) in text for window in windows)


def test_the_seed_alone_decides_the_windows(text_file):
    first, again, other = (calibration_tokens(tiny_tokenizer(), settings(text_file, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.train, other.train)


def test_drawing_windows_leaves_the_global_random_state_alone(text_file):
    before = torch.get_rng_state()
    calibration_tokens(tiny_tokenizer(), settings(text_file))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(5))
def test_every_equal_stretch_of_the_text_gives_one_window(seed, tmp_path):
    path = text_of(tmp_path, 1003)
    starts = in_order(calibration_tokens(Counting(), settings(path, samples=20, length=16, seed=seed)))[:, 0] - 1000
    stretch = 1003 // 20
    assert (starts // stretch).tolist() == list(range(20))
    assert int((starts % stretch).max()) <= stretch - 16
    assert (starts % stretch).unique().numel() > 5


def test_every_tenth_window_is_held_out_and_shares_no_token_with_the_others(tmp_path):
    tokens = calibration_tokens(Counting(), settings(text_of(tmp_path, 2000), samples=40, length=32))
    stretches = (tokens.held_out[:, 0] - 1000) // 50
    assert stretches.tolist() == [9, 19, 29, 39]
    assert not set(tokens.train.flatten().tolist()) & set(tokens.held_out.flatten().tolist())


def test_a_text_of_exactly_the_needed_length_is_used_whole(tmp_path):
    tokens = calibration_tokens(Counting(), settings(text_of(tmp_path, 320), samples=20, length=16))
    assert torch.equal(in_order(tokens).flatten(), torch.arange(1000, 1320))


def test_a_text_one_token_short_is_refused_with_both_counts(tmp_path):
    with pytest.raises(RequestError) as caught:
        calibration_tokens(Counting(), settings(text_of(tmp_path, 319), samples=20, length=16))
    assert "has 319 tokens" in str(caught.value)
    assert "need 320" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_bos_is_put_in_front_of_every_window_once_and_counts_as_a_token(tmp_path):
    windows = in_order(calibration_tokens(Counting(bos=BOS), settings(text_of(tmp_path, 300), samples=20, length=16)))
    assert windows.shape == (20, 16)
    assert windows[:, 0].tolist() == [BOS] * 20
    assert torch.equal(windows[:, 1:].flatten(), torch.arange(1000, 1300))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_only_added_where_a_real_tokenizer_adds_it(adds_bos, text_file):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    if adds_bos:
        template = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = template
    train = calibration_tokens(tokenizer, settings(text_file)).train
    assert (train == tokenizer.bos_token_id).sum(1).tolist() == [int(adds_bos)] * len(train)
    assert bool((train[:, 0] == tokenizer.bos_token_id).all()) == adds_bos


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(RequestError, match="text is empty"):
        tokenize(tiny_tokenizer(), text)


def test_evaluation_chunks_are_the_text_cut_end_to_end_without_the_last_partial_one():
    tokenizer, text = tiny_tokenizer(), some_text(100)
    ids = tokenizer(text)["input_ids"]
    chunks = evaluation_chunks(tokenizer, text, 50)
    assert len(ids) == 599
    assert chunks.shape == (11, 50)
    assert chunks.flatten().tolist() == ids[:550]
    assert torch.equal(evaluation_chunks(tokenizer, text, 50, limit=3), chunks[:3])


def test_a_text_shorter_than_one_chunk_is_refused_with_both_counts():
    assert evaluation_chunks(tiny_tokenizer(), "a" * 50, 50).shape == (1, 50)
    with pytest.raises(RequestError, match="has 49 tokens, less than one chunk of 50"):
        evaluation_chunks(tiny_tokenizer(), "a" * 49, 50)


@pytest.mark.parametrize("name", ["wikitext3", "no/such/file.txt"])
def test_an_unknown_text_is_refused_with_the_names_there_are(name):
    with pytest.raises(RequestError, match="neither a file nor one of wikitext2, c4, pile, pydoc, pytopics") as caught:
        read_text(name)
    assert name in str(caught.value)


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path):
    with pytest.raises(RequestError, match=r"\.txt, \.jsonl, \.parquet; got '\.csv'"):
        read_text(str(text_of(tmp_path, 5, "text.csv")))


def test_all_kinds_of_files_give_the_same_text(tmp_path):
    documents = ["first é", "second\nline", "third"]
    joined = "\n\n".join(documents)
    (tmp_path / "t.txt").write_text(joined, encoding="utf-8")
    lines = [json.dumps({"text": document, "id": 1}) for document in documents]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    table = pyarrow.table({"id": [1, 2, 3], "text": documents})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert [read_text(str(tmp_path / f"t.{kind}")) for kind in ("txt", "jsonl", "parquet")] == [joined] * 3


def write_broken(path):
    contents = {
        "latin.txt": b"caf\xe9",
        "cut.jsonl": b'{"text": "a"}\n{"text": ',
        "other.jsonl": b'{"content": "a"}',
        "null.jsonl": b'{"text": null}',
        "list.jsonl": b'["a"]',
        "bytes.parquet": b"PAR1 not really",
    }
    if path.name in contents:
        path.write_bytes(contents[path.name])
    else:
        column = {"column.parquet": {"content": ["a"]}, "null.parquet": {"text": ["a", None]}}[path.name]
        pyarrow.parquet.write_table(pyarrow.table(column), path)
    return path


BROKEN = ["latin.txt", "cut.jsonl", "other.jsonl", "null.jsonl", "list.jsonl"]
BROKEN += ["bytes.parquet", "column.parquet", "null.parquet"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_work_error_that_names_it(name, tmp_path):
    with pytest.raises(WorkError, match=f"{name} cannot be read as text"):
        read_text(str(write_broken(tmp_path / name)))


def test_documents_are_read_only_until_there_is_enough(tmp_path):
    lines = [json.dumps({"text": "a" * 10})] * 5 + ["this line would be an error"]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert read_text(str(tmp_path / "t.jsonl"), enough_characters=30) == "\n\n".join(["a" * 10] * 3)


def test_pydoc_is_long_enough_and_shares_next_to_nothing_with_pytopics():
    pydoc, topics = read_text("pydoc"), read_text("pytopics")
    assert len(pydoc) >= 300_000
    assert len(topics) >= 300_000
    in_pydoc, in_topics = ({" ".join(p.split()) for p in text.split("\n\n") if len(p) > 80} for text in (pydoc, topics))
    assert min(len(in_pydoc), len(in_topics)) > 500
    # pdb's help and the reference's page on the debugger have a paragraph in common
    assert sum(map(len, in_pydoc & in_topics)) < len(topics) / 1000


def test_the_beginning_of_pydoc_is_the_same_each_time():
    first, second = (read_text("pydoc", enough_characters=50_000) for _ in range(2))
    assert 50_000 <= len(first) < 100_000
    assert first == second


@pytest.mark.parametrize(
    ("name", "evaluation", "split"),
    [("wikitext2", False, "train"), ("wikitext2", True, "test"), ("c4", False, "train"), ("c4", True, "validation")],
)
def test_data_sets_give_their_training_split_unless_it_is_for_evaluation(name, evaluation, split, monkeypatch):
    asked = []

    def load_dataset(*path, **options):
        asked.append(options["split"])
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text(name, evaluation=evaluation) == "one\n\ntwo"
    assert asked == [split]


def test_a_data_set_that_cannot_be_fetched_is_a_work_error_that_names_an_offline_text(monkeypatch):
    def load_dataset(*path, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(WorkError, match=r"NeelNanda/pile-10k cannot be fetched") as caught:
        read_text("pile")
    assert "--calibration pydoc" in str(caught.value)


@pytest.mark.parametrize(("more", "drawn"), [(0, 3), (2, 5), (50, 6)])
def test_further_windows_overlap_none_and_are_as_many_as_there_is_room_for(more, drawn, tmp_path):
    found = windows(Counting(), settings(text_of(tmp_path, 100), samples=3), more)
    assert found.shape == (drawn, 16)
    assert len(found.unique()) == drawn * 16
