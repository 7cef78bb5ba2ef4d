import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.core import affine_grid, grid

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def weights(rows=200, size=64, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def rounded(W, bits, scale, zero):
    q = grid.quantize(W, scale[:, None], zero[:, None], bits)
    return grid.dequantize(q, scale[:, None], zero[:, None], torch.float64)


def error_of(W, bits, scale, zero, importance=1.0, power=2.0):
    return ((rounded(W, bits, scale, zero) - W).abs().pow(power) * importance).sum(-1)


@given(st.sampled_from(DTYPES), st.integers(0, 1000), st.floats(-1e3, 1e3))
def test_zero_points_come_back_from_the_biases_that_are_stored(dtype, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    scale = (0.001 + torch.rand(50, generator=generator)).to(dtype)
    zero = affine_grid.storable_zero(scale, shift + torch.randn(50, generator=generator))
    bias = affine_grid.bias_of(scale, zero)
    assert bias.dtype == dtype
    assert torch.equal(affine_grid.zero_of(scale, bias), zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nearest_storable_zero_point_is_half_a_bit_of_the_bias_away_at_most(dtype):
    scale, wanted = torch.full((64,), 0.1).to(dtype), torch.linspace(-2, 17, 64)
    zero = affine_grid.storable_zero(scale, wanted)
    assert ((zero - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps / 2 + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_least_and_the_greatest_weight_get_the_first_and_the_last_code(bits):
    W = weights() + 3
    scale, zero = affine_grid.choose_scale_zero(W, bits, torch.float32)
    q = grid.quantize(W, scale[:, None], zero[:, None], bits)
    assert (q.gather(1, W.argmin(1, keepdim=True)) == 0).all()
    assert (q.gather(1, W.argmax(1, keepdim=True)) == 2**bits - 1).all()


@pytest.mark.parametrize("value", [0.0, 0.37, -5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_all_the_same_are_kept_up_to_the_dtype(dtype, value):
    W = torch.full((2, 32), value)
    for scale, zero in (
        affine_grid.choose_scale_zero(W, 4, dtype),
        affine_grid.search_scale_zero(W, torch.ones(32), 4, dtype),
    ):
        assert scale.isfinite().all()
        assert zero.isfinite().all()
        torch.testing.assert_close(rounded(W, 4, scale, zero).float(), W, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_searched_grid_is_never_worse_than_the_whole_range_and_often_better(bits, power):
    W, importance = weights(), torch.rand(64, generator=torch.Generator().manual_seed(1))
    whole = affine_grid.choose_scale_zero(W, bits, torch.float16)
    found = affine_grid.search_scale_zero(W, importance, bits, torch.float16, power)
    before, after = (error_of(W, bits, *each, importance, power) for each in (whole, found))
    assert (after <= before).all()
    assert (after < before).float().mean() > (0.9 if bits <= 4 else 0.5)


@pytest.mark.parametrize(
    ("bits", "middle", "code", "real"),
    [(2, 0.1262, 0.1239, 0.1025), (3, 0.0312, 0.0309, 0.0271), (4, 82e-4, 77e-4, 67e-4)],
)
def test_real_zero_points_have_the_errors_of_the_table_which_are_less_than_those_of_codes(bits, middle, code, real):
    W, ones = weights(4096), torch.ones(64)
    grids = [grid.search_scale_zero(W, ones, bits, symmetric, torch.float16) for symmetric in (True, False)]
    grids.append(affine_grid.search_scale_zero(W, ones, bits, torch.float16))
    found = [float(error_of(W, bits, *each).mean() / 64) for each in grids]
    assert found == pytest.approx([middle, code, real], rel=0.01)


def test_shrinking_keeps_the_middle():
    W = weights()
    wide, narrow = (affine_grid.choose_scale_zero(W, 4, torch.float32, shrink) for shrink in (1.0, 0.5))
    torch.testing.assert_close(narrow[0], wide[0] / 2)
    middles = [scale * (7.5 - zero) for scale, zero in (wide, narrow)]
    torch.testing.assert_close(*middles, rtol=1e-5, atol=1e-6)


def test_rows_do_not_know_of_each_other():
    W, importance = weights(17, 32), torch.rand(17, 32, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    found = affine_grid.search_scale_zero(W, importance, 2, torch.float16)
    shuffled = affine_grid.search_scale_zero(W[order], importance[order], 2, torch.float16)
    alone = affine_grid.search_scale_zero(W[3], importance[3], 2, torch.float16)
    for all_, moved, one in zip(found, shuffled, alone, strict=True):
        assert torch.equal(moved, all_[order])
        assert torch.equal(one, all_[3])
