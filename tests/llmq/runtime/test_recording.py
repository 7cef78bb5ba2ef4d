"""A recording does what the function does, for other inputs, and says when it cannot."""

import pytest
import torch
from torch import nn

from llmq.runtime.recording import RecordingError, compiled, record


def names(recording):
    return [call.func._schema.name.partition("::")[2] for call in recording.calls]


def test_a_recording_gives_for_other_inputs_what_the_function_gives():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Unflatten(-1, (3, 4)))
    keys = torch.randn(1, 5, 3, 4)

    def attend(x, y):
        q = layer(x).transpose(0, 1)[None] * y.cos()
        first, second = q.split([1, 2], dim=1)
        q = torch.cat([second, first], dim=1)
        return nn.functional.scaled_dot_product_attention(q, keys.transpose(1, 2), keys.transpose(1, 2), scale=0.3)

    x, y = torch.randn(2, 8), torch.randn(1, 3, 1, 4)
    result, recording = record(attend, (x, y))
    assert torch.equal(result, attend(x, y))
    x, y = torch.randn(2, 8), torch.randn(1, 3, 1, 4)
    assert torch.equal(compiled(recording)(x, y), attend(x, y))


def test_what_the_function_writes_is_written_again():
    cache = torch.zeros(4, 2)

    def write(x, place):
        cache.index_copy_(0, place, x)
        return cache.sum(0) + cache[:2].mean()  # a copy of what was written must not be taken for a constant

    compiled_write = compiled(record(write, (torch.ones(1, 2), torch.tensor([0])))[1])
    assert compiled_write(torch.full((1, 2), 2.0), torch.tensor([3])).tolist() == [3.5, 3.5]
    assert cache.tolist() == [[1, 1], [0, 0], [0, 0], [2, 2]]


def test_a_view_of_a_copy_of_what_is_written_is_no_constant():
    cache = torch.zeros(2, 3)

    def write(x):
        cache.copy_(x)
        return cache.t().contiguous().t() * 2

    assert compiled(record(write, (torch.ones(2, 3),))[1])(torch.full((2, 3), 4.0)).unique().tolist() == [8.0]


def test_constants_repetitions_and_unused_results_cost_nothing():
    weight = torch.randn(3, 3)

    def waste(x):
        scale = (torch.arange(3) + 1).float()
        weight.sum()
        x.exp()
        return (x.to(torch.float32) * scale) @ weight.t() + x.sin() + x.sin()

    _, recording = record(waste, (torch.randn(2, 3),))
    assert sorted(names(recording)) == ["add", "add", "matmul", "mul", "sin"]


def test_random_numbers_are_drawn_anew():
    play = compiled(record(lambda x: torch.rand_like(x) - torch.rand_like(x), (torch.zeros(9),))[1])
    assert not torch.equal(play(torch.zeros(9)), play(torch.zeros(9)))
    assert bool(play(torch.zeros(9)).any())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x[0]),
        lambda x: x[x > 0],
        lambda x: x[torch.nonzero(x)[0, 0]],
    ],
)
def test_a_function_that_looks_at_values_is_not_recorded(function):
    with pytest.raises(RecordingError):
        record(function, (torch.ones(3),))


def test_rows_may_be_chosen_by_number():
    table = torch.randn(9, 2)
    play = compiled(record(lambda i: table[i], (torch.tensor([1, 2]),))[1])
    assert torch.equal(play(torch.tensor([8, 0])), table[[8, 0]])


def test_new_tensors_that_are_written_into_are_neither_shared_nor_kept():
    def sums(x):
        a = torch.zeros(3)
        a += x
        b = torch.zeros(3)
        b -= x
        return a + 2 * b

    play = compiled(record(sums, (torch.ones(3),))[1])
    assert [play(torch.ones(3)).tolist() for _ in range(3)] == [[-1, -1, -1]] * 3
