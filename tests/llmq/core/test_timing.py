"""Seconds by phase, on a CPU and beside a GPU that is not waited for."""

from types import SimpleNamespace

import pytest
import torch

from llmq.core import timing
from llmq.core.timing import Clock


class Gpu:
    """A GPU whose time is set by hand. Its events get the time at which it reaches them."""

    def __init__(self):
        self.now, self.waits = 0.0, 0

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda later: 1000 * (later.at - event.at)
        event.synchronize = lambda: setattr(self, "waits", self.waits + 1)
        return event


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    return gpu


def spend(time, clock, phases):
    """Let time pass in phases: the name of each, its seconds, and the phases inside of it."""
    for name, seconds, inner in phases:
        with clock(name):
            time.now += seconds
            spend(time, clock, inner)


def test_the_time_of_an_inner_phase_is_not_in_the_outer_one(monkeypatch):
    host = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: host.now)
    clock = Clock()
    spend(host, clock, [("a", 2.0, [("b", 3.0, [("a", 0.5, [])])]), ("b", 1.0, [])])
    host.now += 10
    assert clock.seconds == pytest.approx({"a": 2.5, "b": 4.0})
    assert clock.total == pytest.approx(16.5)
    clock.go_on(7.0, {"a": 1.0, "c": 2.0})
    assert clock.seconds == pytest.approx({"a": 3.5, "b": 4.0, "c": 2.0})
    assert clock.total == pytest.approx(23.5)


def test_a_gpu_is_waited_for_only_when_the_seconds_are_read(gpu):
    clock = Clock()
    for _ in range(3):
        spend(gpu, clock, [("forward", 2.0, []), ("statistics", 1.0, [])])
    assert gpu.waits == 0
    assert clock.seconds == pytest.approx({"forward": 6.0, "statistics": 3.0})
    assert gpu.waits == 1


def test_marks_do_not_pile_up(gpu, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_PENDING", 10)
    clock = Clock()
    for _ in range(100):
        spend(gpu, clock, [("forward", 1.0, [])])
        assert len(clock._pending) <= 11
    assert clock.seconds == pytest.approx({"forward": 100.0})


def test_a_gpu_that_comes_into_use_inside_a_phase_is_timed_on_the_host_until_then(gpu, monkeypatch):
    host = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: host.now)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: host.now > 0)
    clock = Clock()
    with clock("open"):
        host.now += 4.0
    spend(gpu, clock, [("forward", 2.0, [])])
    assert clock.seconds == pytest.approx({"open": 4.0, "forward": 2.0})
