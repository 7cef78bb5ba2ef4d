import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.core import grid

BITS = (2, 3, 4, 5, 6, 8)


def weights(rows=5, size=32, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def round_trip(W, bits, symmetric, dtype=torch.float32, shrink=1.0):
    scale, zero = grid.choose_scale_zero(W, bits, symmetric, dtype, shrink)
    q = grid.quantize(W, scale[:, None], zero[:, None], bits)
    return q, scale, zero, grid.dequantize(q, scale[:, None], zero[:, None], torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_largest_weight_is_represented_exactly_by_code_zero(bits, sign):
    W = torch.tensor([[0.5, -0.25, 0.125, 2.0]]) * sign
    q, scale, zero, W_hat = round_trip(W, bits, symmetric=True)
    assert q[0, 3] == 0
    assert W_hat[0, 3] == W[0, 3]
    assert zero[0] == 2 ** (bits - 1)
    assert torch.sign(scale[0]) == -sign


def test_of_two_weights_of_largest_magnitude_the_first_is_on_code_zero():
    W = weights(rows=300).mul(2).round()  # full of ties
    first = W.gather(1, W.abs().argmax(1, keepdim=True))[:, 0]
    for layout in (W, W.T.contiguous().T):
        scale, _ = grid.choose_scale_zero(layout, 4, True, torch.float32)
        assert torch.equal(scale, -first / 8)
    assert ((W.amax(1) == -W.amin(1)).float().mean() > 0.1).all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_step_is_smaller_than_that_of_half_range_grids(bits):
    W = weights()
    scale, _ = grid.choose_scale_zero(W, bits, True, torch.float32)
    common, zero = grid.common_scale_zero(W, bits, torch.float32)
    torch.testing.assert_close(common, W.abs().amax(1) / (2 ** (bits - 1) - 0.5), rtol=1e-6, atol=0)
    assert (zero == 2 ** (bits - 1)).all()
    assert (scale.abs() < common).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_asymmetric_error_is_at_most_half_a_step_and_zero_is_a_code(bits, shift):
    W = weights() + shift  # one-signed groups must still contain 0
    _, scale, zero, W_hat = round_trip(W, bits, symmetric=False)
    # Rounding the zero point can cost another half step at the ends of the range.
    assert ((W - W_hat).abs() <= scale[:, None] * 1.001).all()
    assert (grid.quantize(torch.zeros(5, 1), scale[:, None], zero[:, None], bits) == zero[:, None]).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weights_already_on_the_grid_survive_exactly(bits, symmetric):
    codes = torch.randint(0, 2**bits, (7, 64), generator=torch.Generator().manual_seed(1))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    zero = torch.full((7, 1), 2 ** (bits - 1))
    W = 0.25 * (codes - zero).float()
    q, _, _, W_hat = round_trip(W, bits, symmetric)
    assert torch.equal(W_hat, W)
    assert torch.equal(q.int(), codes.int()) or symmetric  # a negative scale mirrors the codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_are_rounded_against_the_stored_scale(dtype):
    W = weights(rows=64)
    scale, zero = grid.choose_scale_zero(W, 8, True, dtype)
    q = grid.quantize(W, scale[:, None], zero[:, None], 8)
    assert scale.dtype == dtype
    candidates = torch.stack([(q.float() - zero[:, None] + d) * scale.float()[:, None] for d in (-1, 0, 1)])
    inside = (q > 0) & (q < 255)
    nearest = (candidates - W).abs().argmin(0)
    assert (nearest[inside] == 1).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_all_zero_group_decodes_to_zero_with_a_nonzero_scale(dtype, symmetric):
    scale, zero = grid.choose_scale_zero(torch.zeros(3, 32), 4, symmetric, dtype)
    q = grid.quantize(torch.zeros(3, 32), scale[:, None], zero[:, None], 4)
    assert (scale != 0).all()
    assert torch.isfinite(scale).all()
    assert (grid.dequantize(q, scale[:, None], zero[:, None], torch.float32) == 0).all()


def test_small_float16_weights_keep_8_bit_precision():
    # A scale of 2e-5 is below float16's smallest normal; raising it to 6e-5 would triple the error.
    W = weights() * 1e-3
    _, scale, _, W_hat = round_trip(W, 8, True, torch.float16)
    assert (W - W_hat).norm() / W.norm() < 0.01
    assert (scale.abs() < torch.finfo(torch.float16).tiny).any()


def test_shrinking_clips_the_largest_weight_and_refines_the_rest():
    W = torch.cat([weights(1, 31) * 0.1, torch.ones(1, 1)], dim=1)
    _, _, _, full = round_trip(W, 3, True)
    _, _, _, clipped = round_trip(W, 3, True, shrink=0.5)
    assert (W - clipped)[0, -1].abs() > (W - full)[0, -1].abs()
    assert (W - clipped)[0, :-1].norm() < (W - full)[0, :-1].norm()


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_weights_give_codes_in_range_and_finite_values(values, bits, symmetric, dtype):
    W = torch.tensor([values])
    q, scale, zero, W_hat = round_trip(W, bits, symmetric, dtype)
    assert int(q.max()) < 2**bits
    assert int(zero.max()) < 2**bits
    assert torch.isfinite(scale).all()
    assert torch.isfinite(W_hat).all()
    assert ((W - W_hat).abs() <= 1.02 * scale.float().abs()[:, None] + 1e-6 * W.abs().max()).all()


def error_of(W, importance, power, bits, scale, zero):
    q = grid.quantize(W, scale[..., None], zero[..., None], bits)
    E = (W - grid.dequantize(q, scale[..., None], zero[..., None], W.dtype)).abs()
    return (E.pow(power) * importance).sum(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_a_searched_grid_is_never_worse_than_the_whole_range_and_often_better(power, symmetric, bits):
    W = weights(rows=200)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1))
    whole = grid.choose_scale_zero(W, bits, symmetric, torch.float16)
    found = grid.search_scale_zero(W, importance, bits, symmetric, torch.float16, power)
    before, after = (error_of(W, importance, power, bits, *each) for each in (whole, found))
    assert (after <= before).all()
    assert (after < before).float().mean() > (0.9 if bits <= 4 else 0.3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_a_grid_with_one_unimportant_outlier_are_found_exactly(bits, symmetric):
    q = torch.arange(32).remainder(2**bits).to(torch.uint8)
    zero = torch.tensor([2 ** (bits - 1)], dtype=torch.uint8)
    W = grid.dequantize(q, torch.tensor([0.25]), zero, torch.float32)[None]
    W[0, 5] *= 1.2
    importance = torch.ones(32)
    importance[5] = 0
    scale, zero = grid.search_scale_zero(W, importance, bits, symmetric, torch.float32)
    assert scale.abs().item() == pytest.approx(0.25, rel=1e-6)
    assert error_of(W, importance, 2, bits, scale, zero).item() < 1e-10


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_do_not_know_of_each_other(symmetric):
    W = weights(rows=17)
    importance = torch.rand(17, 32, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    for bits in (2, 4):
        scale, zero = grid.search_scale_zero(W, importance, bits, symmetric, torch.float16)
        shuffled = grid.search_scale_zero(W[order], importance[order], bits, symmetric, torch.float16)
        assert torch.equal(shuffled[0], scale[order])
        assert torch.equal(shuffled[1], zero[order])
        alone = grid.search_scale_zero(W[3], importance[3], bits, symmetric, torch.float16)
        assert torch.equal(alone[0], scale[3])
