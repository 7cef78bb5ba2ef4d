from dataclasses import replace
from itertools import chain

import pytest
import torch

from llmq.training.loop import Task, batches, train


class InMemory:
    """Keeps the state after every step."""

    is_due = True

    def __init__(self):
        self.tensors = {}

    def save(self, tensors):
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def load(self):
        return self.tensors


def task_of(w, fixed, held_out=None):
    def loss(indices):
        assert all(0 <= index < 6 for index in indices)
        return ((w - 1) ** 2).sum() + ((fixed - 1) ** 2).sum()

    measure = held_out or (lambda: float(((w - 1) ** 2).sum()))
    return Task([([w], 0.1), ([fixed], 0.0)], 6, loss, measure, lambda: w.detach().clone())


def test_it_learns_and_leaves_parameters_of_rate_0_alone():
    w, fixed = torch.zeros(3), torch.zeros(3)
    best, (before, after) = train(task_of(w, fixed), steps=40, batch=2, start=w.clone())
    assert before == 3.0
    assert after == pytest.approx(float(((best - 1) ** 2).sum()))
    assert after < 0.1
    assert torch.equal(fixed, torch.zeros(3))


def test_the_best_state_wins_not_the_last():
    w, losses = torch.zeros(1), iter([5.0, 4.0, 1.0, 3.0, 2.0, 6.0])
    best, ends = train(task_of(w, torch.zeros(1), lambda: next(losses)), steps=5, batch=2, start=w.clone())
    assert ends == (5.0, 1.0)
    assert 0 < float(best) < float(w)


def test_a_loss_that_never_falls_returns_the_start():
    w, start = torch.zeros(1), torch.tensor([7.0])
    best, ends = train(task_of(w, torch.zeros(1), lambda: 2.0), steps=10, batch=2, start=start)
    assert best is start
    assert ends == (2.0, 2.0)
    assert float(w) > 0  # it did train


def test_every_sample_is_seen_once_before_any_is_seen_again():
    drawn = list(batches(6, 2, 6))
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(6))
    assert drawn[:3] != drawn[3:]
    assert list(batches(6, 2, 6)) == drawn
    assert [len(batch) for batch in batches(5, 2, 4)] == [2] * 4
    assert [sorted(batch) for batch in batches(3, 8, 2)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("done", [0, 1, 7, 19])
def test_an_interrupted_training_goes_on_to_the_same_end(done):
    targets = torch.arange(6.0)[:, None]

    def training(saved, stop=99):
        w, seen = torch.zeros(1), []

        def loss(indices):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(indices)
            return (w - targets[indices]).square().mean()

        task = Task([([w], 0.3)], 6, loss, lambda: float((w - 2.5).square()), lambda: {"w": w.detach().clone()})
        return train(task, 20, 2, {}, saved=saved), w, seen

    (best, ends), last, order = training(None)
    saved = InMemory()
    with pytest.raises(KeyboardInterrupt):
        training(saved, done)
    (again, its_ends), its_last, its_order = training(saved)
    assert its_order == order[done:]
    assert its_ends == ends
    assert torch.equal(again["w"], best["w"])
    assert torch.equal(its_last, last)


def test_a_resumed_training_that_nothing_improved_still_returns_the_start():
    w, saved = torch.zeros(1), InMemory()
    task = task_of(w, torch.zeros(1), lambda: 2.0)
    train(replace(task, state=lambda: {"w": w}), 4, 2, {}, saved=saved)
    saved.tensors["step"] = torch.tensor(2)
    assert train(replace(task, state=lambda: {"w": w}), 4, 2, {}, saved=saved) == ({}, (2.0, 2.0))


FOREIGN = {
    "other tensors": lambda kept: {"a": torch.zeros(2)},
    "a moment is missing": lambda kept: {name: x for name, x in kept.items() if name != "exp_avg.0"},
    "another shape": lambda kept: kept | {"parameter.0": torch.zeros(5)},
    "another shape of a moment": lambda kept: kept | {"exp_avg_sq.0": torch.zeros(5)},
    "not finite": lambda kept: kept | {"parameter.0": torch.full((1,), torch.nan)},
    "no step": lambda kept: kept | {"step": torch.tensor(-1)},
    "steps that do not exist": lambda kept: kept | {"step": torch.tensor(100)},
    "another best state": lambda kept: kept | {"best.other": torch.zeros(1)},
}


@pytest.mark.parametrize("damage", FOREIGN)
def test_a_state_of_another_training_is_not_believed(damage):
    def training(saved):
        w = torch.zeros(1)
        task = Task(
            [([w], 0.3)], 6, lambda _: (w - 1).square().sum(), lambda: float((w - 1).square()), lambda: {"w": w}
        )
        return train(replace(task, state=lambda: {"w": w.detach().clone()}), 6, 2, {}, saved=saved)

    whole, saved = training(None), InMemory()
    training(saved)
    saved.tensors = FOREIGN[damage](saved.tensors | {"step": torch.tensor(3)})
    best, ends = training(saved)
    assert ends == whole[1]
    assert torch.equal(best["w"], whole[0]["w"])
