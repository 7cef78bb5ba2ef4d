import json

import pytest

from llmq.core.errors import RequestError
from llmq.formats.scheme import Scheme
from llmq.run.journal import FinishedStep, Journal, read_journal

FINGERPRINT = {"config": {"bits": 4}}


def journal(path, *lines):
    written = Journal(path)
    written.begin(FINGERPRINT)
    for line in lines:
        written.add(line)
    return written


LINES = ({"finished": "outside"}, {"block": "0", "error": 0.5}, {"finished": "0"}, {"block": "1", "error": 0.25})


def test_finished_steps_come_with_their_groups_and_what_follows_does_not_count(tmp_path):
    journal(tmp_path / "j", *LINES)
    fingerprint, steps = read_journal(tmp_path / "j")
    assert fingerprint == FINGERPRINT
    assert [(step.finished["finished"], step.groups) for step in steps] == [("outside", []), ("0", [LINES[1]])]


@pytest.mark.parametrize("cut", range(1, len('{"finished": "0"}') + 2))
def test_however_much_of_the_last_line_is_missing_the_steps_before_it_stand(cut, tmp_path):
    path = tmp_path / "j"
    journal(path, *LINES[:3])
    path.write_bytes(path.read_bytes()[:-cut])
    assert [step.finished["finished"] for step in read_journal(path)[1]] == ["outside"]


def test_going_on_keeps_finished_steps_only(tmp_path):
    path = tmp_path / "j"
    journal(path, *LINES)
    Journal(path).begin(FINGERPRINT, read_journal(path)[1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"fingerprint": FINGERPRINT}, *LINES[:3]]
    assert [each.name for each in tmp_path.iterdir()] == ["j"]


def test_no_journal_and_no_json_are_no_steps(tmp_path):
    assert read_journal(tmp_path / "none") == ({}, [])
    (tmp_path / "j").write_text("what?\n")
    assert read_journal(tmp_path / "j") == ({}, [])


def test_without_a_path_nothing_is_written():
    nothing = Journal(None)
    nothing.begin(FINGERPRINT)
    nothing.add({"finished": "0"})


def test_one_that_is_there_but_cannot_be_read_is_not_taken_for_none(tmp_path):
    assert read_journal(tmp_path / "none") == ({}, [])
    with pytest.raises(RequestError, match="cannot be read"):
        read_journal(tmp_path)


# In the form of version 0.1.0.
OLD = (
    '{"finished": "model.layers.0", "parts": 2, "digests": {"model.layers.0.mlp.up_proj": "ab", "norm": "cd"}, '
    '"schemes": {"model.layers.0.mlp.up_proj": [4, 32, true, false, 0]}, "notes": [{"where": "model", "note": "n"}], '
    '"drift": 0.25, "refined": [2.0, 1.5], "distilled": null, "seconds": {"total": 3.5, "solve": 1.0}, '
    '"states": {"name": "1f", "turn": 1, "kinds": ["quantized", "original"], "ranks": 2, "boot": null}}'
)


def test_a_finished_step_is_the_same_line_as_ever():
    step = FinishedStep.from_json(json.loads(OLD))
    assert json.dumps(step.to_json()) == OLD
    assert (step.name, step.parts, step.refined, step.distilled) == ("model.layers.0", 2, (2.0, 1.5), None)
    assert step.schemes == {"model.layers.0.mlp.up_proj": Scheme(4, 32, True)}
    first = json.loads(OLD) | {"drift": None, "refined": None, "distilled": [0.5, 0.25], "states": None}
    assert FinishedStep.from_json(first).distilled == (0.5, 0.25)
    assert json.loads(json.dumps(FinishedStep.from_json(first).to_json())) == first


@pytest.mark.parametrize("line", ["5", "null", "[1, 2]", '"fingerprint"'])
def test_a_line_that_is_no_object_ends_what_counts(line, tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text(f'{{"fingerprint": {{"a": 1}}}}\n{{"finished": "x"}}\n{line}\n{{"finished": "y"}}\n')
    fingerprint, steps = read_journal(path)
    assert fingerprint == {"a": 1}
    assert [step.finished["finished"] for step in steps] == ["x"]
