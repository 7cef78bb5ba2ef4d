"""llmq.write: texts that a model writes itself, as rows to train on."""

import json
import re

import pytest
from commands import run_here

from llmq.calibration.text_files import rows_of
from llmq.calibration.texts import windows
from llmq.core.errors import RequestError
from llmq.core.settings import Calibration
from llmq.models.model_source import ModelSource
from llmq.runtime.own_texts import WriteConfig, write_texts

SMALL = {"samples": 5, "sequence_length": 24, "device": "cpu"}


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_the_seed_decides_which_texts_are_written(llama, tmp_path):
    first, again, other = (
        write_texts(WriteConfig(str(llama), tmp_path / f"{i}.jsonl", seed=seed, **SMALL))
        for i, seed in enumerate((3, 3, 4))
    )
    assert first.read_bytes() == again.read_bytes()
    texts = texts_of(first)
    assert len(set(texts)) == 5
    assert not set(texts) & set(texts_of(other))
    assert [row["text"] for _, row in rows_of(first)] == texts


def test_texts_go_on_from_pieces_of_a_text(llama, text_file, tmp_path):
    pieces = {"begin_with": str(text_file), "begin_tokens": 9}
    path = write_texts(WriteConfig(str(llama), tmp_path / "own.jsonl", **SMALL, **pieces))
    tokenizer = ModelSource(str(llama)).tokenizer
    wanted = windows(tokenizer, Calibration(str(text_file), 5, 9))
    starts = tokenizer.batch_decode(wanted, skip_special_tokens=True)
    for text, start in zip(texts_of(path), starts, strict=True):
        assert text.startswith(start)
        assert len(text) > len(start)


def test_the_program_makes_its_directory_and_says_what_it_wrote(llama, tmp_path):
    output = tmp_path / "new" / "own.jsonl"
    flags = ("--samples", "3", "--sequence-length", "16", "--device", "cpu")
    done = run_here("llmq.write", "--model", llama, "--output", output, *flags)
    assert (done.returncode, done.stdout) == (0, f"3 texts of 16 tokens: {output}\n")
    trained = tmp_path / "trained"
    shape = ("--group-size", "32", "--start", "rtn", "--steps", "2", "--sequence-length", "8", "--batch", "1")
    done = run_here("llmq.train", "--model", llama, "--output", trained, "--data", output, "--loss", "kl", *shape)
    assert done.returncode == 0, done.stderr
    again = run_here("llmq.write", "--model", llama, "--output", output, *flags)
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {output} is there already")
    done = run_here("llmq.write", "--model", llama, "--output", output, *flags, "--overwrite", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["own.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "own.txt"}, "must end in .jsonl; got 'own.txt'"),
        ({"output": "file/own.jsonl"}, "own.jsonl cannot be written: "),
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"sequence_length": 1}, "sequence length must be at least 2 tokens; got 1"),
        ({"sequence_length": 257}, "sequence length 257 exceeds the model's context of 256 tokens"),
        ({"begin_with": "pytopics", "begin_tokens": 24}, "less than the sequence length of 24; got 24"),
        ({"begin_with": "none", "begin_tokens": 9}, "no such text: 'none'"),
        ({"min_p": 1.0}, "min p must be at least 0 and less than 1; got 1.0"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, cuda:N; got 'gpu'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_writes_nothing(options, said, llama, tmp_path):
    (tmp_path / "file").touch()
    options = {"output": "own.jsonl"} | SMALL | options
    with pytest.raises(RequestError, match=re.escape(said)):
        write_texts(WriteConfig(str(llama), tmp_path / options.pop("output"), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
