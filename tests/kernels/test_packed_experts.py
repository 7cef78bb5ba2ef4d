"""The kernels for mixtures against float64: interpreted (float16, no PTX) and on a GPU (both dtypes, PTX)."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from llmq_kernels import packed_experts as module
from llmq_kernels.choose import COUNTERS, Tile
from llmq_kernels.experts import tiles_for
from llmq_kernels.packed_matmul import packed_matmul
from oracle import FLOAT16, ONE_ROUNDING, TWO_ROUNDINGS, WHERE
from some_experts import error_of, experts_of, some_bias_and_scores, some_routing, some_tokens
from weights import BITS

TILE = Tile(8, 128, 8, 2)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory comes full of NaN, or of numbers far from any expert or pair: nothing can rely on what it holds."""
    empty = torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 30000)

    monkeypatch.setattr(torch, "empty", poisoned)


def run(x, weights, index, bias=None, scores=None, tile=TILE, twice=False):
    """The kernel's result, on a GPU always twice, with the same bits; counters must be zero again each time."""
    counters = torch.zeros(module.COUNTERS, dtype=torch.int32, device=x.device)
    index = index.to(x.device)
    times = 2 if twice or x.is_cuda else 1
    first, *again = (module.packed_experts(x, weights, index, bias, scores, counters, tile) for _ in range(times))
    assert not counters.any()
    assert first.dtype == x.dtype
    assert all(torch.equal(first.view(torch.int16), other.view(torch.int16)) for other in again)
    return first


def one_of_each():
    """Every width, kind of zero point and group; sizes, routings and tiles change from one to the next."""
    choice = random.Random(2).choice
    inputs = {16: (480, 528), 32: (480, 576), 64: (448, 576), 128: (384, 640), 256: (512, 768), -1: (64, 129, 480)}
    for bits, symmetric, group in itertools.product(BITS, (True, False), inputs):
        (T, k, E), BM = choice([((1, 2, 5), 8), ((3, 2, 4), 8), ((2, 4, 4), 8), ((17, 2, 3), 16), ((33, 2, 3), 64)])
        wide = BM == 64 and bits < 4  # the shared memory of GPUs has no room for more columns of so many planes
        chunk = min(choice([16] if wide else [16, 32, 64, 64]), group if group in (16, 32) else 64)
        tile = Tile(BM, 128, 8, 2, choice([1, 1, 2]), chunk, choice([False, True]))
        shape = (choice([65, 65, 65, 200]), choice(inputs[group]))
        yield pytest.param(
            bits, symmetric, group, (T, k, E), shape, tile, choice([False, True]),
            id=f"{bits}-{'sym' if symmetric else 'asym'}-{group}",
            marks=[pytest.mark.smoke] if symmetric and group == 128 else [],
        )  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("bits", "symmetric", "group", "routing", "shape", "tile", "second"), list(one_of_each()))
def test_the_result_is_float64s_up_to_rounding(bits, symmetric, group, routing, shape, tile, second, where):
    (T, k, E), (N, K) = routing, shape
    weights, index = experts_of(where, E, N, K, bits, group, symmetric), some_routing(T, k, E)
    # An expert's second matmul has a row for each choice of a token, and its outputs are scaled.
    x = some_tokens(where, T * k if second else T, K)
    bias, scores = some_bias_and_scores(where, index, E, N) if second else (None, None)
    y = run(x, weights, index, bias, scores, tile)
    assert error_of(y, x, weights, index, bias, scores) < (TWO_ROUNDINGS if tile.fold else ONE_ROUNDING)[where[1]]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("T", [1, 2, 5, 16, 63, 129, 256])
def test_any_number_of_tokens_up_to_256_is_taken(T, where):
    weights, index, x = experts_of(where, 5, 65, 128), some_routing(T, 2, 5), some_tokens(where, T, 128)
    y = run(x, weights, index, tile=Tile(8 if T < 16 else 64, 128, 8, 2))
    assert error_of(y, x, weights, index) < ONE_ROUNDING[where[1]]


ROUTINGS = {
    "all to the first": torch.zeros(20, 1, dtype=torch.int64),
    "all to the last": torch.full((20, 1), 3),
    "all to all": torch.arange(4).expand(9, -1),
    "every token's choices are the same": torch.tensor([[2, 2, 2]]).expand(5, -1),
    "one token's choices are the same": torch.tensor([[1, 1]]),
    "one token, one expert": torch.tensor([[3]]),
    "one over a tile": torch.tensor([[0]] * 9 + [[2]] * 17),
    "int32": torch.tensor([[0, 2], [3, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ROUTINGS)
def test_any_routing_gives_the_result(name, splits, where):
    index = ROUTINGS[name].contiguous()
    weights, x = experts_of(where, 4, 65, 448), some_tokens(where, len(index), 448)
    y = run(x, weights, index, tile=replace(TILE, splits=splits), twice=True)
    assert error_of(y, x, weights, index) < ONE_ROUNDING[where[1]]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("splits", [1, 2])
def test_each_expert_computes_the_bits_of_packed_matmul_on_its_tokens(splits, where):
    weights, x = experts_of(where, 3, 65, 576, 4, 32, False), some_tokens(where, 15, 576)
    index = (torch.arange(30) % 3).view(15, 2)  # ten tokens for each: two tiles
    tile = Tile(8, 128, 8, 2, splits, 32)
    bias, _ = some_bias_and_scores(where, index, 3, 65)
    y = run(x, weights, index, bias, None, tile).flatten(0, 1)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    for e in range(3):
        mine = (index.flatten() == e).nonzero().flatten().to(x.device)
        alone = packed_matmul(x[mine // 2], weights.expert(e), bias[e], counters, tile)
        assert torch.equal(y[mine], alone)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("where", WHERE)
def test_a_token_that_is_not_finite_leaves_the_others_alone(where):
    weights, index, x = experts_of(where, 3, 65, 448), some_routing(6, 2, 3), some_tokens(where, 6, 448)
    clean = run(x, weights, index)
    x[1, 7], x[2, 400] = float("inf"), float("nan")
    y = run(x, weights, index)
    assert torch.equal(y[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])
    assert not y[1].isfinite().any()
    assert bool(y[2].isnan().all())


@pytest.mark.parametrize("where", FLOAT16)
def test_an_index_out_of_range_is_the_nearest_experts(where):
    weights, x = experts_of(where, 3, 65, 128), some_tokens(where, 4, 128)
    wild, near = torch.tensor([[-7], [3], [1], [1 << 40]]), torch.tensor([[0], [2], [1], [0]])
    for tokens in (slice(None), slice(1)):
        assert torch.equal(run(x[tokens], weights, wild[tokens]), run(x[tokens], weights, near[tokens]))


@pytest.mark.parametrize("where", WHERE)
def test_where_tiles_outnumber_the_counters_k_is_not_split(where, monkeypatch):
    monkeypatch.setattr(module, "COUNTERS", 2)  # for 3 tiles
    weights, index, x = experts_of(where, 3, 65, 448), some_routing(4, 2, 3), some_tokens(where, 4, 448)
    assert torch.equal(run(x, weights, index, tile=replace(TILE, splits=2)), run(x, weights, index))


# ---- the table of tiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", FLOAT16)
@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize(
    ("T", "k", "E", "BM"), [(2, 1, 1, 8), (7, 3, 5, 8), (40, 4, 20, 16), (128, 2, 7, 64), (9, 9, 40, 8)]
)
def test_the_table_holds_every_pair_once_with_its_expert(T, k, E, BM, chunk, where, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    index = some_routing(T, k, E)
    check_table(module.route(index.to(where[0]), E, BM).cpu(), index, E, BM)


@pytest.mark.parametrize("where", FLOAT16)
@pytest.mark.parametrize("BM", [8, 16])
def test_as_many_tiles_as_there_can_be_are_there(BM, where):
    index = torch.cat([torch.arange(5), torch.full((3 * BM,), 2)])[:, None]  # each expert's last tile has one pair
    table = module.route(index.to(where[0]), 5, BM).cpu()
    check_table(table, index, 5, BM)
    assert bool((table[:, 0] >= 0).all())
    assert len(table) == tiles_for(len(index), 5, BM) == 8


def check_table(table, index, E, BM):
    P, pairs = index.numel(), index.flatten()
    used = int((table[:, 0] >= 0).sum())
    assert table.shape == (tiles_for(P, E, BM), 1 + BM)
    assert bool((table[used:, 0] == -1).all())
    seen = []
    for expert, *tile in table[:used].tolist():
        real = [pair for pair in tile if pair != P]
        assert real
        assert tile == real + [P] * (BM - len(real))  # what is left of a tile is no pair
        assert bool((pairs[real] == expert).all())
        seen += real
    assert seen == pairs.argsort(stable=True).tolist()  # by expert, then in the order of the tokens
    assert used == sum(-(-n // BM) for n in pairs.bincount(minlength=E).tolist())


# ---- on GPUs ------------------------------------------------------------------------------------------------------

GPU = [parameter for parameter in WHERE if parameter.values[0][0] == "cuda"]


@pytest.mark.smoke
@pytest.mark.parametrize("where", GPU)
def test_a_graph_takes_another_routing_at_each_replay(where):
    weights, x = experts_of(where, 8, 200, 2048), some_tokens(where, 6, 2048)
    counters, tile = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda"), Tile(8, 64, 4, 3, 2)
    index = torch.zeros(6, 2, dtype=torch.int64, device="cuda")
    for _ in range(2):
        module.packed_experts(x, weights, index, None, None, counters, tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.packed_experts(x, weights, index, None, None, counters, tile)
    for seed in range(3):
        index.copy_(some_routing(6, 2, 8, seed))
        graph.replay()
        assert error_of(y, x, weights, index) < ONE_ROUNDING[where[1]]
