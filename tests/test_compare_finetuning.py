"""The comparison of fine-tuning makes its questions of Python's own library."""

import ast
import json
import shutil

from commands import run_here
from forked import forking


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_questions(train, test):
    """Questions say what a function does, answers name it in a fixed form, and few questions are asked twice."""
    assert len(train) > 8 * len(test) > 0
    for row in [*train, *test]:
        assert row["prompt"].startswith("Which function of Python's library does this?\n\n")
        name, module, arguments = (line.split(": ", 1) for line in row["completion"].split("\n"))
        assert [each[0] for each in (name, module, arguments)] == ["name", "module", "arguments"]
        ast.parse(f"def {name[1]}(): pass")
    questions = {row["prompt"] for row in train}
    assert sum(row["prompt"] in questions for row in test) < 0.2 * len(test)


def test_the_table_compares_float_with_two_ways_to_quantize(llama, tmp_path):
    model, room = shutil.copytree(llama, tmp_path / "model"), tmp_path / "room"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    settings = ["--group-size", "32", "--steps", "4", "--batch", "8", "--questions", "300", "--rate", "0.005"]
    with forking():
        done = run_here("compare_finetuning", "--model", model, *settings, "--sequence-length", "256", "--room", room)
        assert done.returncode == 0, done.stderr
        again = run_here("compare_finetuning", "--model", model, *settings, "--sequence-length", "256", "--room", room)
    assert again.stdout == done.stdout
    assert len(rows_in(room / "rows.jsonl")) == 4
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["original", "fine-tuned", "fine-tuned, then gptq at 4 bit", "QAT at 4 bit"]
    original, tuned, _, qat = (float(row[1]) for row in rows)
    assert tuned < original
    assert qat < original
    check_questions(*(rows_in(room / f"{name}.jsonl") for name in ("train", "test")))
