import json

import pytest
import torch
from tiny import tiny_tokenizer

from llmq.calibration.answers import IGNORED, examples, is_conversations, told
from llmq.core.errors import RequestError, WorkError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def chat():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def written(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def learned(example, chat):
    return chat.decode(example.labels[example.labels != IGNORED])


def test_only_what_the_assistant_says_is_learned_with_the_mark_that_ends_it(tmp_path, chat):
    rows = [{"messages": [*TURNS, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]}]
    (example,), faults = examples(written(tmp_path / "a.jsonl", *rows), chat, 200)
    assert learned(example, chat) == "Yes.</>No.</>"
    assert chat.decode(example.ids) == "<user>Hi?</><assistant>Yes.</><user>And?</><assistant>No.</>"
    assert torch.equal(example.ids[example.labels != IGNORED], example.labels[example.labels != IGNORED])
    assert faults == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    ],
)
def test_every_kind_of_conversation_is_read(row, tmp_path, chat):
    (example,), _ = examples(written(tmp_path / "a.jsonl", row), chat, 200)
    assert learned(example, chat) == "Yes.</>"


def test_rows_without_an_answer_empty_ones_and_long_ones_are_told_by_number(tmp_path, chat):
    rows = [
        {"messages": TURNS[:1]},
        {"messages": TURNS},
        {"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
        {"messages": []},
        {"messages": [TURNS[0], {"role": "assistant", "content": "x" * 500}]},
        {"note": "hello"},
        ["no object"],
    ]
    found, faults = examples(written(tmp_path / "a.jsonl", *rows), chat, 200)
    assert len(found) == 1
    assert [fault.partition(":")[0] for fault in faults] == [f"row {n}" for n in (1, 3, 4, 5, 6, 7)]
    assert "no answer" in faults[0]
    assert "more than --sequence-length 200" in faults[3]
    assert "(and 1 more)" in told(faults)


def test_a_file_without_a_single_good_row_is_refused_with_the_reasons(tmp_path, chat):
    with pytest.raises(RequestError, match="row 1: no answer"):
        examples(written(tmp_path / "a.jsonl", {"messages": TURNS[:1]}), chat, 200)


def test_a_row_that_is_no_json_is_told_by_number(tmp_path, chat):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n{broken", encoding="utf-8")
    with pytest.raises(WorkError, match="row 2"):
        examples(tmp_path / "a.jsonl", chat, 200)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no chat template"):
        examples(written(tmp_path / "a.jsonl", {"messages": TURNS}), tiny_tokenizer(), 200)


def test_earlier_answers_that_the_template_rewrites_later_are_not_learned(tmp_path, chat):
    """Templates of reasoning models leave out the thoughts of all answers but the last."""
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('|')[-1] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "hm|Yes."},
        TURNS[0],
        {"role": "assistant", "content": "so|No."},
    ]
    (example,), _ = examples(written(tmp_path / "a.jsonl", {"messages": turns}), chat, 200)
    assert learned(example, chat) == "so|No.</>"


def test_files_of_text_are_told_from_files_of_conversations(tmp_path):
    assert is_conversations(written(tmp_path / "a.jsonl", {"messages": TURNS}))
    assert not is_conversations(written(tmp_path / "b.jsonl", {"text": "Hi"}))
    (tmp_path / "c.txt").write_text("Hi")
    assert not is_conversations(tmp_path / "c.txt")
