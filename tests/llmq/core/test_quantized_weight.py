"""QuantizedWeight: what the codes stand for, and what is refused."""

import dataclasses

import pytest
import torch
from packed import random_weight

from llmq.core.errors import CheckpointError
from llmq.core.settings import BITS


def by_the_formula(weight):
    """scale * (q - zero), element by element in Python's own numbers."""
    rows, columns = weight.q.shape
    group_of = [k // weight.group_size for k in range(columns)] if weight.group_of is None else weight.group_of.tolist()
    q, scale, zero = weight.q.tolist(), weight.scale.tolist(), weight.zero.tolist()
    return [[scale[n][g] * (q[n][k] - zero[n][g]) for k, g in enumerate(group_of)] for n in range(rows)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (3, 7, 1), (5, 33, 11), (2, 34, 17)])
def test_dequantize_is_the_formula(rows, columns, groups, bits, symmetric):
    weight = random_weight(rows, columns, groups, bits, symmetric)
    # float16 scales times integers below 256 are exact in float32.
    assert weight.dequantize().tolist() == by_the_formula(weight)
    assert weight.dequantize(torch.float64).tolist() == by_the_formula(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_in_a_short_dtype_rounds_the_exact_product_once(dtype):
    weight = random_weight(5, 33, 11, 8, False, dtype)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float64).to(dtype))


def test_dequantize_follows_act_order_groups():
    generator = torch.Generator().manual_seed(3)
    group_of = (torch.arange(21) % 3)[torch.randperm(21, generator=generator)].to(torch.int32)
    weight = dataclasses.replace(random_weight(4, 21, 3, 4, False), group_of=group_of)
    weight.validate()
    assert weight.dequantize().tolist() == by_the_formula(weight)


def test_act_order_groups_may_be_uneven():
    weight = dataclasses.replace(random_weight(4, 5, 2), group_of=torch.tensor([1, 0, 1, 1, 1], dtype=torch.int32))
    weight.validate()
    assert weight.dequantize().tolist() == by_the_formula(weight)


@pytest.mark.parametrize(
    ("group_of", "size"),
    [([1, 0, 1, 1, 0, 1], 2), ([1, 0, 1, 1, 1], 1), ([0, 0, 0, 2, 2, 2, 2, 2, 2], 3), ([0, 1, 2], 1), ([0] * 7, 7)],
)
def test_even_groups_have_the_largest_common_size_and_the_same_weights(group_of, size):
    groups = max(group_of) + 1
    weight = random_weight(3, len(group_of), groups, symmetric=False)
    weight = dataclasses.replace(weight, group_of=torch.tensor(group_of, dtype=torch.int32))
    even = weight.even()
    even.validate()
    counts = torch.arange(len(group_of)) // size if even.group_of is None else even.group_of
    assert set(torch.bincount(counts).tolist()) == {size}
    assert even.scale.shape[1] * size == len(group_of)
    assert (even.group_of is None) == (group_of == sorted(group_of))
    assert torch.equal(even.dequantize(), weight.dequantize())


def test_contiguous_act_order_is_no_order_at_all():
    weight = random_weight(3, 14, 2, 3, False)
    ordered = dataclasses.replace(weight, group_of=torch.arange(14, dtype=torch.int32) // 7)
    assert torch.equal(ordered.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("columns", "groups", "size"), [(96, 3, 32), (37, 1, 37), (7, 7, 1)])
def test_group_size_is_inputs_per_group(columns, groups, size):
    assert random_weight(2, columns, groups).group_size == size


@pytest.mark.parametrize("bits", BITS)
def test_validate_accepts_the_extreme_codes_and_zero_points(bits):
    weight = random_weight(3, 14, 2, bits)
    top = 2**bits - 1
    dataclasses.replace(weight, q=torch.full_like(weight.q, top), zero=torch.full_like(weight.zero, top)).validate()
    dataclasses.replace(weight, q=torch.zeros_like(weight.q), zero=torch.zeros_like(weight.zero)).validate()


def wrong(**parts):
    weight = random_weight(3, 14, 2)
    for name, tensor in parts.items():
        object.__setattr__(weight, name, tensor)  # past the annotations, which only tests check
    return weight


def scale_with(value):
    scale = random_weight(3, 14, 2).scale
    scale[2, 1] = value
    return scale


REFUSED = {
    "a row of scales short": (lambda: wrong(scale=torch.ones(2, 2)), "do not fit 3 rows"),
    "more zeros than scales": (lambda: wrong(zero=torch.zeros(3, 7, dtype=torch.uint8)), "do not fit 3 rows"),
    "no groups": (lambda: wrong(scale=torch.ones(3, 0), zero=torch.zeros(3, 0, dtype=torch.uint8)), "do not fit"),
    "groups that do not divide": (
        lambda: wrong(scale=torch.ones(3, 4), zero=torch.zeros(3, 4, dtype=torch.uint8)),
        "4 groups do not divide 14 inputs",
    ),
    "NaN scale": (lambda: wrong(scale=scale_with(float("nan"))), "not finite"),
    "infinite scale": (lambda: wrong(scale=scale_with(float("-inf"))), "not finite"),
    "code out of range": (lambda: wrong(q=torch.full((3, 14), 16, dtype=torch.uint8)), "exceeds 4 bits"),
    "zero out of range": (lambda: wrong(zero=torch.full((3, 2), 16, dtype=torch.uint8)), "exceeds 4 bits"),
    "group index too high": (lambda: wrong(group_of=torch.full((14,), 2, dtype=torch.int32)), r"in \[0, 2\)"),
    "group index negative": (lambda: wrong(group_of=torch.full((14,), -1, dtype=torch.int32)), r"in \[0, 2\)"),
    "group indices too few": (lambda: wrong(group_of=torch.zeros(13, dtype=torch.int32)), r"in \[0, 2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validate_refuses_parts_that_do_not_fit_and_names_the_weight(case):
    make, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason) as caught:
        make().validate("layers.3.q_proj")
    assert str(caught.value).startswith("layers.3.q_proj: ")
