"""The comparison of budgets with uniform bits measures both and reads the line between them."""

import math

import pytest
from commands import run_here
from compare_budgets import interpolated
from forked import forking

from llmq.core.errors import RequestError


def test_between_two_points_the_line_is_straight_on_a_log_scale():
    points = [(3.25, 0.4), (4.25, 0.1), (5.25, 0.02)]
    assert interpolated(points, 3.75) == pytest.approx(0.2)
    assert interpolated(points, 4.25) == pytest.approx(0.1)
    assert interpolated(points, 4.75) == pytest.approx(math.sqrt(0.002))
    with pytest.raises(RequestError, match=r"store 3\.250 to 5\.250 bits"):
        interpolated(points, 3.0)


def test_the_table_has_a_line_for_each_run_with_the_ratio_for_budgets(llama, text_file, tmp_path):
    paths = ["--model", llama, "--calibration", text_file, "--text", text_file, "--results", tmp_path / "rows.jsonl"]
    shape = ["--group-size", "32", "--samples", "10", "--sequence-length", "32", "--chunk", "128", "--limit", "2"]
    with forking():
        done = run_here("compare_budgets", *paths, *shape, "--budgets", "3.9", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["3 bit", "4 bit", "budget 3.9"]
    assert [row[1] for row in rows[:2]] == ["3.529", "4.529"]
    assert 3.8 < float(rows[2][1]) <= 3.9
    assert float(rows[2][4]) == pytest.approx(float(rows[2][2]) / float(rows[2][3]), abs=0.01)
    assert 0.3 < float(rows[2][5]) < 3
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3 * 2
