"""The time of a solve: a model with four factors, fitted to four times."""

import pytest
from planned import open_run

from llmq.plan import microbenchmarks
from llmq.plan.microbenchmarks import Speeds


@pytest.fixture
def fit(monkeypatch, llama, text_file, tmp_path):
    """A function that fits the model where a problem takes `seconds(columns, rows)`; options go to the run."""

    def fitted(seconds, **options):
        def fixed_and_per_row(run, columns):
            return seconds(columns, 0), seconds(columns, 1) - seconds(columns, 0)

        monkeypatch.setattr(microbenchmarks, "_fixed_and_per_row", fixed_and_per_row)
        _, run = open_run(llama, text_file, tmp_path / "out", **options)
        factors = microbenchmarks._solve_factors(run, 1e-9, 512, 1024)
        return Speeds(product=1e-9, moment=1e-9, addition=1e-9, solve=factors, weight=0.0, byte=0.0)

    return fitted


def test_times_that_follow_the_model_are_continued_to_any_size(fit):
    def seconds(n, rows):
        return 3e-6 * n + 2e-9 * n**3 + rows * (4e-8 * n + 5e-9 * n**2)

    speeds = fit(seconds)
    for rows, columns in ((256.0, 512), (768.0, 1024), (22016.0, 4096), (4096.0, 11008)):
        assert speeds.solving(rows, columns) == pytest.approx(seconds(columns, rows), rel=1e-9)


def test_without_statistics_time_is_proportional_to_columns(fit):
    speeds = fit(lambda n, rows: 2e-6 * n + rows * 1e-8 * n, method="rtn")
    assert speeds.solving(100.0, 4096) == pytest.approx(4096 * (2e-6 + 100 * 1e-8))


@pytest.mark.parametrize(("effort", "times"), [("normal", 1), ("best", 2)])
def test_a_disturbed_time_does_not_grow_with_the_cube_of_the_columns(fit, effort, times):
    speeds = fit(lambda n, rows: 100.0 if n == 1024 else 0.1, effort=effort)
    assert speeds.solve[1] == pytest.approx(6 * times * 1e-9)
    assert speeds.solving(0.0, 1024) == pytest.approx(100.0)  # the wide time itself is kept
    assert fit(lambda n, rows: 0.1 if n == 1024 else 100.0, effort=effort).solve[1] == 0.0


def test_the_shortest_of_a_few_times_counts(monkeypatch):
    now, ends = [0.0], iter([0.05, 0.02, 0.04, 0.03, 0.06])

    def work():
        now[0] += next(ends)

    monkeypatch.setattr("llmq.core.timing.time.perf_counter", lambda: now[0])
    assert microbenchmarks._seconds(work) == pytest.approx(0.02)
    assert list(ends) == []  # all five tries took 0.2 s together


def test_long_work_is_timed_once(monkeypatch):
    now = [0.0]

    def work():
        now[0] += 0.3

    monkeypatch.setattr("llmq.core.timing.time.perf_counter", lambda: now[0])
    assert microbenchmarks._seconds(work) == pytest.approx(0.3)
    assert now == [0.3]
