"""The operator of experts: one answer on every device, opaque to torch.compile."""

import jaxtyping
import pytest
import torch
from llmq_kernels import experts_op, new_counters, reference, routed_linear, stack_experts
from llmq_kernels.choose import Device, Problem
from llmq_kernels.cpu_native import NativeMatmul
from llmq_kernels.experts_op import rule_for_experts
from oracle import ONE_ROUNDING
from some_experts import error_of, experts_of, some_bias_and_scores, some_routing, some_tokens
from weights import BITS, shuffled_groups, some_weight

CPU = ("cpu", torch.float32)
H200 = Device("H200", 90, 132, 227 << 10)


@pytest.fixture
def unchecked():
    """No checks of shapes and types: torch.compile cannot look through what they wrap around every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def routed(x, weights, index, bias=None, scores=None):
    return routed_linear(x, weights, index, bias, scores, new_counters(x.device))


def some(T=5, k=2, E=4, second=False, where=CPU, bits=4, symmetric=True):
    weights, index = experts_of(where, E, 33, 96, bits, 32, symmetric), some_routing(T, k, E)
    return some_tokens(where, T * k if second else T, 96), weights, index, *some_bias_and_scores(where, index, E, 33)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_result_is_float64s(bits, second):
    x, weights, index, bias, scores = some(second=second, bits=bits, symmetric=False)
    y = routed(x, weights, index, bias, scores)
    assert (y.shape, y.dtype) == ((5, 2, 33), torch.float32)
    assert error_of(y, x, weights, index, bias, scores) < 1e-6
    exact = reference.routed_matmul(x.double(), weights, index, bias.double(), scores.double())
    assert error_of(exact, x.double(), weights, index, bias, scores) < 1e-14


def test_each_expert_takes_its_inputs_in_its_own_order():
    made = [some_weight(33, 96, 3, 4, group_of=shuffled_groups(96, 3, seed), seed=seed) for seed in range(4)]
    weights, index = stack_experts([weight for weight, _ in made]), some_routing(5, 2, 4)
    for rows in (5, 10):
        x = torch.randn(rows, 96, dtype=torch.float64)
        y = routed(x, weights, index)
        each = x if rows == 10 else x.repeat_interleave(2, 0)
        expected = torch.stack([made[e][1] @ row for e, row in zip(index.flatten().tolist(), each, strict=True)])
        torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_only_experts_with_tokens_are_multiplied(monkeypatch):
    x, weights, _, _, _ = some(T=3)
    rows, multiply = [], NativeMatmul.__call__
    monkeypatch.setattr(NativeMatmul, "__call__", lambda self, x: rows.append(len(x)) or multiply(self, x))
    routed(x, weights, torch.tensor([[2, 0], [2, 0], [0, 2]]))
    assert rows == [3, 3]


@pytest.mark.parametrize(("T", "k"), [(0, 2), (3, 0)])
def test_nothing_to_multiply_gives_nothing(T, k):
    x, weights, _, bias, _ = some(T=3)
    index = torch.zeros(T, k, dtype=torch.int64)
    assert routed(x[:T], weights, index, bias, torch.zeros(T, k)).shape == (T, k, 33)


def test_what_cannot_be_is_refused():
    x, weights, index, *_ = some()
    with pytest.raises(ValueError, match="5 tokens with 2 experts each have no 4 rows"):
        routed(x[:4], weights, index)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"there is no expert {wrong}: there are 4"):
            routed(x, weights, index.clone().fill_(wrong))


def test_torchs_own_checks_of_an_operator_pass():
    x, weights, index, bias, scores = some()
    rest = (new_counters("cpu"), 4, 32, True)
    for extra in ((bias, scores), (None, None)):
        arguments = (x, list(weights.words), weights.grid, index, *extra, *rest)
        torch.library.opcheck(torch.ops.llmq.routed_linear.default, arguments)


def test_a_compiled_function_has_it_as_one_call_for_every_number_of_tokens(unchecked):
    compilations, counters = [], new_counters("cpu")
    weights = some()[1]
    function = torch.compile(
        lambda x, index: routed_linear(x * 2, weights, index, None, None, counters) + 1,
        fullgraph=True, dynamic=True, backend=lambda graph, inputs: compilations.append(graph) or graph,
    )  # fmt: skip
    for T in (7, 5, 40):
        x, _, index, *_ = some(T)
        assert torch.equal(function(x, index), routed(x * 2, weights, index) + 1)
    assert len(compilations) == 1
    assert sum("llmq.routed_linear" in str(node.target) for node in compilations[0].graph.nodes) == 1


@pytest.mark.interpret
@pytest.mark.parametrize("T", [1, 4])
def test_what_a_gpu_launches_takes_any_strides(T, monkeypatch):
    monkeypatch.setattr(experts_op, "describe", lambda _: Device("some GPU", 90, 1, 227 << 10))
    monkeypatch.setattr("llmq_kernels.op.describe", lambda _: H200)
    monkeypatch.setattr(experts_op, "own", lambda counters: counters)
    x, weights, index, bias, scores = some(T, where=("cpu", torch.float16))
    strided = [tensor.T.contiguous().T if tensor.ndim == 2 else tensor for tensor in (x, index, bias, scores)]
    y = experts_op.launched(strided[0], weights, *strided[1:], new_counters("cpu"))
    assert error_of(y, x, weights, index, bias, scores) < ONE_ROUNDING[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 8, 256])
@pytest.mark.filterwarnings("ignore:llmq. the kernels take")
def test_a_gpu_gives_float64s_results_with_the_rules_tiles(T, dtype):
    where = ("cuda", dtype)
    weights, index = experts_of(where, 16, 200, 2048, 4, 128), some_routing(T, 4, 16)
    bias, scores = some_bias_and_scores(where, index, 16, 200)
    x = some_tokens(where, T, 2048)
    y = routed(x, weights, index.cuda(), bias, scores)
    assert torch.equal(y, routed(x, weights, index.cuda(), bias, scores))
    assert error_of(y, x, weights, index, bias, scores) < {torch.float32: 1e-3, **ONE_ROUNDING}[dtype]


def test_the_rule_has_taller_tiles_the_more_tokens_an_expert_has_and_splits_what_is_little():
    def tile(T, experts=128, k=8, N=1536, K=2048):
        return rule_for_experts(H200, Problem(4, 128, True, "bfloat16", T, N, K), experts, k)

    assert [tile(T).BM for T in (1, 8, 32, 64, 128, 256, 4096)] == [8, 8, 8, 8, 16, 32, 64]
    assert [tile(T).BM for T in (1, 32)] == [8, 8]
    assert tile(1).splits > 1  # 8 experts are few programs
    assert tile(32).splits == 1
    assert tile(1, K=768, N=2048).splits == 1  # three blocks


@pytest.mark.parametrize("N", [65, 1536])
def test_the_rule_asks_for_experts_what_it_asks_for_one_weight_of_their_rows(N):
    for T, BM in ((1, 8), (256, 32)):
        problem = Problem(4, 128, True, "float16", T, N, 2048)
        tile = rule_for_experts(H200, problem, 128, 8)
        assert tile.BM == BM
        assert tile.chunk <= problem.plane
