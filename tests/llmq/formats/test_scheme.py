import pytest
import torch
from packed import random_weight

from llmq.core.errors import CheckpointError
from llmq.formats.scheme import Scheme, checked, entry, expect_scales, expect_words, the_only


def test_the_last_group_of_a_row_may_be_short_and_minus_one_is_one_group():
    assert [Scheme(4, 32, True).groups(columns) for columns in (32, 33, 64)] == [1, 2, 2]
    assert Scheme(4, -1, True).groups(100) == 1


def test_a_change_keeps_all_other_fields_and_is_checked_like_a_config():
    scheme = Scheme(4, 32, False, act_order=True, zero_offset=1)
    assert scheme.changed({"bits": 8}) == Scheme(8, 32, False, act_order=True, zero_offset=1)
    with pytest.raises(CheckpointError, match="7 bits per weight; llmq reads 2, 3, 4, 5, 6, 8"):
        scheme.changed({"bits": 7})


def test_a_number_of_thousands_of_digits_is_refused_in_a_short_line():
    with pytest.raises(CheckpointError, match=r"^a huge number bits per weight"):
        Scheme.of(10**5000, 32, True)
    with pytest.raises(CheckpointError, match=r"^group size a huge number; it must be positive"):
        Scheme.of(4, -(10**5000), True)


def test_an_entry_that_is_null_counts_as_missing_but_false_and_zero_do_not():
    config = {"sym": None, "desc_act": False, "bits": 0}
    assert entry(config, "sym", default=True) is True
    assert entry(config, "sym", "desc_act", default=True) is False
    assert entry(config, "bits", default=4) == 0


def test_tensors_of_another_dtype_or_shape_are_refused_with_both():
    expect_words("a", torch.zeros(2, 3, dtype=torch.int32), (2, 3))
    expect_scales("a", torch.zeros(2, 3, dtype=torch.bfloat16), (2, 3))
    with pytest.raises(CheckpointError, match=r"^a: expected int32 \(2, 3\), found torch.int64 \(2, 3\)"):
        expect_words("a", torch.zeros(2, 3, dtype=torch.int64), (2, 3))
    with pytest.raises(CheckpointError, match=r"^a: expected floats \(2, 3\), found torch.float32 \(3, 2\)"):
        expect_scales("a", torch.zeros(3, 2), (2, 3))


def test_the_zero_points_of_a_symmetric_weight_must_be_the_middle():
    weight = random_weight(2, 32, bits=3)
    assert checked("a", weight, Scheme(3, 32, True)) is weight
    weight.zero[1] = 5
    assert checked("a", weight, Scheme(3, 32, False)) is weight
    with pytest.raises(CheckpointError, match=r"^a: its zero points are not all 4"):
        checked("a", weight, Scheme(3, 32, True))


def test_a_value_that_differs_between_layers_is_refused_with_the_reason():
    schemes = {"a": Scheme(4, 32, True), "b": Scheme(4, 64, True)}
    assert the_only(schemes, lambda scheme: scheme.bits, "one number of bits") == 4
    with pytest.raises(CheckpointError, match=r"^one group size; these layers have 32, 64$"):
        the_only(schemes, lambda scheme: scheme.group_size, "one group size")
