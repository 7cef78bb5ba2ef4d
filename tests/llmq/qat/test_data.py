import json

import pytest
import torch
from tiny import some_text, tiny_model, tiny_tokenizer

from llmq.calibration.answers import IGNORED, Example
from llmq.core.errors import RequestError
from llmq.core.train_config import TrainConfig
from llmq.qat.data import collated, data_of

MODEL = tiny_model("llama-gqa")


def config(tmp_path, data, **options):
    return TrainConfig("m", tmp_path / "out", (str(data),), **({"sequence_length": 32, "samples": 40} | options))


def test_a_text_gives_windows_and_every_tenth_is_held_out(tmp_path):
    (tmp_path / "t.txt").write_text(some_text())
    data = data_of(config(tmp_path, tmp_path / "t.txt"), tiny_tokenizer(), MODEL)
    assert (len(data.train), len(data.held_out)) == (36, 4)
    every = [*data.train, *data.held_out]
    assert {len(example.ids) for example in every} == {32}
    assert all(int(example.labels[0]) == IGNORED for example in every)
    assert all(torch.equal(example.labels[1:], example.ids[1:]) for example in every)
    texts = {tuple(example.ids.tolist()) for example in data.train}
    assert not texts & {tuple(example.ids.tolist()) for example in data.held_out}


def test_conversations_give_their_answers_and_faults_of_rows_are_told(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    rows = [{"prompt": f"a{i}", "completion": "b" * (90 if i == 3 else 2)} for i in range(12)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = data_of(config(tmp_path, tmp_path / "c.jsonl"), tokenizer, MODEL)
    assert (len(data.train), len(data.held_out)) == (10, 1)
    assert data.left_out == "1 rows were left out: " + data.faults[0]
    assert data.faults[0].startswith("c.jsonl, row 4: ")
    assert {tokenizer.decode(e.labels[e.labels != IGNORED]) for e in data.train} == {"bb"}


def test_several_texts_are_mixed_and_all_are_held_out_from(tmp_path):
    for name in "ab":
        (tmp_path / name).with_suffix(".txt").write_text((name + " ") * 2000)
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    settings = TrainConfig("m", tmp_path / "out", tuple(names), sequence_length=32, samples=20)
    data = data_of(settings, tiny_tokenizer(), MODEL)
    for part in (data.train, data.held_out):
        texts = [tiny_tokenizer().decode(example.ids) for example in part]
        assert sum("a" in text for text in texts) == sum("b" in text for text in texts) == len(part) / 2


def test_one_sequence_is_too_little(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="one sequence only"):
        data_of(config(tmp_path, tmp_path / "c.jsonl"), tokenizer, MODEL)


def test_short_sequences_are_filled_up_with_what_counts_for_nothing():
    batch = collated([Example(torch.tensor(ids), torch.tensor(ids)) for ids in ([5, 6, 7], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
