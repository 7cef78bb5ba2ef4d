"""The marks in a block's arguments become the values of one run; what blocks leave is kept for later ones."""

from collections import UserDict

import pytest
import torch

from llmq.calibration.block_arguments import (
    Carried,
    Left,
    PerBatch,
    PerSequence,
    Resolver,
    Shared,
    SharedStates,
    as_float32,
)
from llmq.calibration.hidden_states import BatchValues, HiddenDir

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "dim", "of_three"),
    [((1, 1, 5, 5), 0, (3, 1, 5, 5)), ((4, 1, 5), 0, (12, 1, 5)), ((2, 1, 5), 1, (2, 3, 5)), ((5, 2), 1, (5, 6))],
)
def test_an_argument_of_one_sequence_is_made_that_of_several(shape, dim, of_three):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = PerSequence(one, dim).of(3)
    assert made.shape == of_three
    assert all(torch.equal(part, one) for part in made.chunk(3, dim))


def test_a_run_gets_the_values_of_its_micro_batch_and_the_sample_its_own():
    values = BatchValues(None, "argument0")
    values[4] = torch.ones(2, 3)
    argument = PerBatch(PerSequence(torch.zeros(1, 3)), values)
    assert torch.equal(Resolver(2, 4, None, CPU)(argument), torch.ones(2, 3))
    assert torch.equal(Resolver(2, None, None, CPU)(argument), torch.zeros(2, 3))


def test_what_is_kept_is_a_copy_of_a_part_alone():
    values, whole = BatchValues(None, "argument0"), torch.zeros(100, 3)
    values[0] = (whole[:1],)
    whole += 1
    assert values[0][0].untyped_storage().nbytes() == 3 * 4
    assert not values[0][0].any()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_containers_hold_what_earlier_blocks_left_in_them(kind, on_disk, tmp_path):
    states = SharedStates(HiddenDir(tmp_path, "run") if on_disk else None, carries=True)
    run = Resolver(1, 0, states.entering((0, False), CPU), CPU)
    container = run(Shared(1, kind))
    assert isinstance(container, kind)
    assert len(container) == 0
    assert not run.was_written()
    container["keys"] = torch.ones(2), torch.zeros(2)
    assert run.was_written()
    states.leave((0, False), run.left_by((torch.zeros(1), torch.full((3,), 7.0))))
    again = Resolver(1, 0, states.entering((0, False), CPU), CPU)
    assert torch.equal(again(Shared(1, kind))["keys"][0], torch.ones(2))
    assert torch.equal(again(Carried(0)), torch.full((3,), 7.0))
    assert not again.was_written()
    again(Shared(1, kind)).clear()  # this run's alone
    assert again.was_written()
    for key, size in (((0, False), 1), ((0, True), 0), ((1, False), 0)):
        assert len(Resolver(1, 0, states.entering(key, CPU), CPU)(Shared(1, kind))) == size
    assert len(list(tmp_path.glob("run-shared-0-False.states"))) == on_disk


def test_lists_are_shared_too():
    states = SharedStates()
    for length in range(3):
        run = Resolver(1, 0, states.entering((0, False), CPU), CPU)
        seen = run(Shared(1, list))
        assert len(seen) == length
        seen.append(torch.zeros(1))
        states.leave((0, False), run.left_by(torch.zeros(1)))


def test_what_the_sample_leaves_counts_from_the_next_block_on():
    states = SharedStates(carries=True)
    states.leave(None, Left({1: {"keys": torch.ones(3)}}, (torch.ones(2),)))
    assert states.sample_bytes == 5 * 4
    assert states.entering(None, CPU) == Left({})
    states.next_block()
    assert states.entering(None, CPU).containers[1]["keys"].shape == (3,)


def test_all_that_holds_floats_can_be_made_float32():
    half, number = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.int64)
    assert as_float32(PerBatch(PerSequence(half), BatchValues(None, ""))).of_sample.of_one.dtype == torch.float32
    assert as_float32(number).dtype == torch.int64
    states = SharedStates(carries=True)
    states.leave(None, Left({1: {"keys": half}}, (number,)))
    states.next_block()
    left = states.as_float32().entering(None, CPU)
    assert left.containers[1]["keys"].dtype == torch.float32
    assert left.carried[0].dtype == torch.int64


def test_what_nobody_takes_is_not_kept(tmp_path):
    states = SharedStates(HiddenDir(tmp_path, "run"))
    states.leave((0, False), Left({1: {}}, (torch.ones(2),)))
    assert states.is_empty
    assert not list(tmp_path.iterdir())
    states.leave((0, False), Left({1: {"keys": torch.ones(3)}}, (torch.ones(2),)))
    assert not states.is_empty
    assert states.entering((0, False), CPU).carried == ()
