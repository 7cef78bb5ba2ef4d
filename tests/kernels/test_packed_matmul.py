"""The fused kernel against float64: in Triton's interpreter (float16, no PTX) and on a GPU (both dtypes, PTX)."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from llmq_kernels import packed_matmul as module
from llmq_kernels.choose import Tile
from llmq_kernels.layout import block_of, pack
from oracle import FLOAT16, ONE_ROUNDING, TWO_ROUNDINGS, WHERE, expected, move, relative_error, some_problem
from weights import BITS, some_codes

TILE = Tile(8, 128, 8, 2)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory comes full of NaN, so that nothing can rely on what it happens to hold."""
    empty = torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def run(x, weight, bias=None, tile=TILE, y=None):
    """The kernel's result; counters must be zero again. Where it may change, it is taken twice, with the same bits.

    The interpreter does one thing after the other: without counters, no second call differs from the first.
    """
    tiles = -(-len(x) // tile.BM) * -(-weight.out_features // tile.BN)
    counters = torch.zeros(tiles if tile.splits > 1 else 0, dtype=torch.int32, device=x.device)
    first = module.packed_matmul(x, weight, bias, counters, tile, y)
    assert not counters.any()
    assert first.dtype == x.dtype
    if x.is_cuda or tile.splits > 1:
        first = first.clone()
        again = module.packed_matmul(x, weight, bias, counters, tile, y)
        assert not counters.any()
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))
        return again
    return first


def one_of_each():
    """Every width, kind of zero point and group; sizes and tiles change from one to the next."""
    choice = random.Random(1).choice
    inputs = {16: (480, 528), 32: (480, 576), 64: (448, 576), 128: (384, 640), 256: (512, 768), -1: (64, 129, 480)}
    for bits, symmetric, group in itertools.product(BITS, (True, False), inputs):
        M, BM = choice([(1, 8), (2, 8), (3, 16), (8, 8), (16, 16), (33, 64)])
        wide = BM == 64 and bits < 4  # the shared memory of GPUs has no room for more columns of so many planes
        chunk = min(choice([16] if wide else [16, 32, 64, 64, 64]), group if group in (16, 32) else 64)
        tile = Tile(BM, 128, 8, 2, choice([1, 1, 2, 3, 4]), chunk, choice([False, True]))
        yield pytest.param(
            bits, symmetric, group, (M, choice([65, 65, 200]), choice(inputs[group])), tile, choice([False, True]),
            id=f"{bits}-{'sym' if symmetric else 'asym'}-{group}",
            marks=[pytest.mark.smoke] if symmetric and group == 128 else [],
        )  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "symmetric", "group", "shape", "tile", "biased"), list(one_of_each()))
def test_the_result_is_float64s_up_to_rounding(bits, symmetric, group, shape, tile, biased, where):
    x, weight, bias = some_problem(where, *shape, bits, group, symmetric)
    bias = bias if biased else None
    y = run(x, weight, bias, tile)
    assert relative_error(y, x, weight, bias) < (TWO_ROUNDINGS if tile.fold else ONE_ROUNDING)[where[1]]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("BM", [8, 16, 64])
@pytest.mark.parametrize("M", [1, 2, 3, 8, 16, 33])
def test_any_number_of_tokens_fits_any_tile(M, BM, where):
    x, weight, bias = some_problem(where, M, 65, 448)
    assert relative_error(run(x, weight, bias, Tile(BM, 128, 8, 2)), x, weight, bias) < ONE_ROUNDING[where[1]]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("splits", "fold"), [(1, False), (2, True), (3, False), (4, True), (8, False), (8, True)])
def test_any_number_of_splits_gives_the_result(splits, fold, where):
    x, weight, bias = some_problem(where, 3, 200, 272, 8, 16, symmetric=False)  # 9 blocks, and a program without any
    y = run(x, weight, bias, Tile(8, 128, 8, 2, splits, 16, fold))
    assert relative_error(y, x, weight, bias) < (TWO_ROUNDINGS if fold else ONE_ROUNDING)[where[1]]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_sums_of_integers_are_exact(bits, symmetric, fold, where):
    x, weight, bias = integers(where, 3, 65, 320, bits, symmetric)
    tile = Tile(8, 128, 8, 2, 2, 32, fold)
    assert torch.equal(run(x, weight, bias, tile), expected(x, weight, bias).to(x))


def integers(where, M, N, K, bits, symmetric, scale=1.0, codes=None, group=64):
    """A problem whose every product and sum float32 holds, with scales of both signs."""
    x, weight, bias = some_problem(where, M, N, K, bits, group, symmetric)
    codes = some_codes(N, K, bits) if codes is None else torch.full((N, K), codes, dtype=torch.uint8)
    cpu = move(weight, "cpu")
    weight = pack(codes, (cpu.scale().sign() * scale).half(), cpu.zero(), bits)
    return (x * 3).round(), move(weight, where[0]), (bias * 9).round()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-14, 512.0])
@pytest.mark.parametrize("codes", [0, 15])
def test_the_least_and_greatest_codes_and_scales_are_exact(codes, scale, where):
    for symmetric in (True, False):
        x, weight, _ = integers(where, 2, 65, 128, 4, symmetric, scale, codes)
        x = torch.zeros_like(x).scatter_(1, torch.tensor([[3], [100]], device=x.device), 1)
        assert torch.equal(run(x, weight), expected(x, weight).to(x))


@pytest.mark.parametrize("where", FLOAT16)
def test_the_least_and_greatest_tokens_are_exact(where):
    _, weight, _ = integers(where, 1, 65, 128, 4, True, 2.0**-3)
    x = torch.zeros(6, 128, dtype=torch.float16, device=where[0])
    x[[0, 1, 2, 3], [0, 63, 64, 127]] = torch.tensor([65504, -65504, 2.0**-24, -(2.0**-14)]).to(x)
    x[4] = 2.0**-24
    y = run(x, weight)
    assert torch.equal(y, expected(x, weight).to(x))
    assert bool(y[:4].any(dim=1).all())
    assert not y[5].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_token_that_is_not_finite_leaves_the_others_alone(splits, where):
    x, weight, bias = some_problem(where, 4, 65, 448)
    tile = Tile(8, 128, 8, 2, splits)
    clean = run(x, weight, bias, tile)
    x[1, 7], x[2, 400] = float("inf"), float("nan")
    y = run(x, weight, bias, tile)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert not y[1].isfinite().any()
    assert bool(y[2].isnan().all())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_but_the_result_is_written(splits, where):
    x, weight, bias = some_problem(where, 3, 65, 448)
    buffer = torch.full((9, 65), float("nan"), dtype=x.dtype, device=x.device)
    y = run(x, weight, bias, Tile(8, 128, 8, 2, splits), buffer[3:6])
    assert y.data_ptr() == buffer[3:6].data_ptr()
    assert relative_error(buffer[3:6], x, weight, bias) < ONE_ROUNDING[where[1]]
    assert bool(buffer[:3].isnan().all() & buffer[6:].isnan().all())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "group", "K"), [(2, 16, 208), (3, 32, 480), (4, 64, 448), (8, -1, 129), (4, -1, 1)])
def test_nothing_is_read_beyond_the_tokens_and_the_grids(bits, group, K, where):
    x, weight, _ = some_problem(where, 3, 65, K, bits, group, symmetric=False)
    assert K % block_of(bits, weight.plane)  # the last block is padded
    tile = Tile(8, 128, 8, 2, chunk=weight.plane)
    fenced = replace(weight, grid=fence(weight.grid.view(torch.float32)).view(torch.int32))
    assert relative_error(run(fence(x), fenced, None, tile), x, weight) < ONE_ROUNDING[where[1]]


def fence(tensor):
    """The same values with NaN before and after them in memory."""
    flat = torch.full((tensor.numel() + 4096,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = flat[2048:-2048].view_as(tensor)
    return inside.copy_(tensor)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_one_input_and_one_output_are_enough(bits, symmetric, where):
    for N, K in ((1, 1), (1, 200), (65, 1)):
        x, weight, bias = integers(where, 2, N, K, bits, symmetric, group=-1)
        assert torch.equal(run(x, weight, bias), expected(x, weight, bias).to(x))


GPU = [parameter for parameter in WHERE if parameter.values[0][0] == "cuda"]
TILES = [Tile(8, 64, 4, 3), Tile(8, 64, 4, 2, 3, 32), Tile(16, 64, 4, 2, 2), Tile(64, 128, 8, 2, 1, 16, True)]


@pytest.mark.parametrize("where", GPU)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (True, False)))
def test_the_asm_and_its_twin_agree_to_the_bit(bits, symmetric, tile, where, monkeypatch):
    x, weight, bias = some_problem(where, 40, 200, 2048 + 64, bits, 64, symmetric)
    asm = run(x, weight, bias, tile)
    assert relative_error(asm, x, weight, bias) < (TWO_ROUNDINGS if tile.fold else ONE_ROUNDING)[where[1]]
    monkeypatch.setattr(module, "uses_asm", lambda x: False)
    assert torch.equal(run(x, weight, bias, tile), asm)


@pytest.mark.parametrize("where", GPU)
@pytest.mark.parametrize("splits", [1, 3])
def test_starting_while_the_previous_kernel_ends_changes_no_bit(splits, where):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch came with sm_90")
    x, weight, bias = some_problem(where, 3, 200, 2048)
    plain = run(x, weight, bias, Tile(8, 64, 4, 3, splits))
    for _ in range(20):  # every launch depends on the one before it
        counters = torch.zeros(64, dtype=torch.int32, device="cuda")
        early = module.packed_matmul(x * 1, weight, bias, counters, Tile(8, 64, 4, 3, splits, pdl=True))
        assert torch.equal(early, plain)


@pytest.mark.parametrize("where", FLOAT16)
def test_a_chunk_that_the_plane_does_not_have_is_refused(where):
    x, weight, _ = some_problem(where, 1, 65, 480, 4, 16)
    with pytest.raises(Exception, match=r"PLANE % CHUNK|AssertionError"):
        run(x, weight, None, Tile(8, 128, 8, 2, chunk=64))
