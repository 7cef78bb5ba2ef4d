"""Rows of files: plain text, and conversations in the ways that data sets store them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from llmq.calibration.text_files import documents
from llmq.core.errors import RequestError, WorkError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
SAID = "<user>hi<assistant>hello"


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*names):
    role, content, *speakers = names
    return [{role: who, content: what} for who, what in zip(speakers, ("hi", "hello"), strict=True)]


MESSAGES = turns("role", "content", "user", "assistant")
CONVERSATIONS = [
    {"messages": MESSAGES, "id": 1},
    {"conversations": turns("from", "value", "human", "gpt")},
    {"conversations": MESSAGES and turns("from", "value", "user", "assistant")},
    {"prompt": "hi", "completion": "hello"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
]


def file_of(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", CONVERSATIONS, ids=lambda row: "+".join(row))
def test_a_conversation_becomes_text_by_the_models_template(row, kind, tokenizer, tmp_path):
    assert list(documents(file_of(tmp_path / f"a.{kind}", [row, row]), tokenizer)) == [SAID, SAID]


def test_a_text_is_taken_as_it_is_and_needs_no_template(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"text": "one", "messages": None}, {"text": "two"}])
    assert list(documents(path)) == ["one", "two"]


def test_without_a_template_a_prompt_is_followed_by_its_completion(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"prompt": "2 + 2 = ", "completion": "4"}])
    assert list(documents(path, tiny_tokenizer())) == ["2 + 2 = 4"]


def test_a_conversation_without_a_template_is_refused(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(RequestError, match=r"row 1: it is a conversation, but the model has no chat template"):
        list(documents(path, tiny_tokenizer()))


def test_a_template_that_refuses_a_row_is_told_with_its_number(tokenizer, tmp_path):
    tokenizer.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    path = file_of(tmp_path / "a.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES[::-1]}])
    with pytest.raises(RequestError, match=r"row 2: the chat template does not take this conversation: user first"):
        list(documents(path, tokenizer))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": None}, "its text is null, not a string; leave the row out"),
        ({"text": 5}, "its text is int"),
        ({"content": "a"}, "it has none of text, messages"),
        ({"messages": None}, "or null in their place"),
        ({"messages": [{"role": "user", "content": None}]}, "a message needs a role and a content"),
        ({"messages": ["hi"]}, "a message needs a role and a content; found hi"),
        ({"conversations": ["hi"]}, "a message needs a role and a content"),
        ("[1]", "list instead of an object"),
        ('{"text": ', "JSONDecodeError"),
    ],
)
def test_a_row_without_text_is_told_with_its_number(row, said, tokenizer, tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "good"}, row])
    with pytest.raises(WorkError, match=rf"a\.jsonl cannot be read as text: row 3: .*{said}"):
        list(documents(path, tokenizer))
