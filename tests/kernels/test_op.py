"""The operator: one answer on every device and size, opaque to torch.compile."""

import copy
import io
import itertools

import jaxtyping
import pytest
import torch
from llmq_kernels import matmul, new_counters, op, packed_linear, reference
from llmq_kernels.choose import Device
from llmq_kernels.layout import PackedWeight
from oracle import ONE_ROUNDING, TWO_ROUNDINGS, WHERE, expected, relative_error, some_problem
from packed import random_weight
from weights import BITS, WIDTHS, shuffled_groups, some_weight

from llmq.runtime.packed_linear import PackedLinear

CPU = ("cpu", torch.float32)
GPU = [parameter for parameter in WHERE if parameter.values[0][0] == "cuda"]


@pytest.fixture
def unchecked():
    """No checks of shapes and types: torch.compile cannot look through what they wrap around every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def linear(x, weight, bias=None):
    return packed_linear(x, weight, bias, new_counters(x.device))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_act_order_weight_takes_its_inputs_as_they_come(symmetric):
    weight, dense = some_weight(33, 96, 3, 4, symmetric, group_of=shuffled_groups(96, 3))
    x = torch.randn(5, 96, dtype=torch.float64)
    torch.testing.assert_close(linear(x, weight), x @ dense.T, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_are_kept_and_may_be_empty():
    x, weight, bias = some_problem(CPU, 6, 33, 96)
    y = linear(x, weight, bias)
    assert torch.equal(linear(x.view(1, 2, 3, 96), weight, bias), y.view(1, 2, 3, 33))
    assert linear(x[0], weight, bias).shape == (33,)
    assert linear(x[:0], weight, bias).shape == (0, 33)
    assert linear(x.view(2, 3, 96)[:, :0], weight, bias).shape == (2, 0, 33)


def test_inputs_need_not_be_contiguous():
    x, weight, bias = some_problem(CPU, 6, 33, 96)
    strided = x.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(linear(strided, weight, bias), linear(x, weight, bias))


def test_kernels_for_gpus_get_contiguous_tokens_of_any_input(monkeypatch):
    x, weight, _ = some_problem(("cpu", torch.float16), 6, 40, 96)
    seen = []
    monkeypatch.setattr(op, "describe", lambda _: Device("some GPU", 90, 1, 1 << 17))
    monkeypatch.setattr(op, "_on_gpu", lambda rows, weight, *_: seen.append(rows) or reference.matmul(rows, weight))
    for strided in (x.view(2, 3, 96).transpose(0, 1), x.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2]):
        assert not strided.is_contiguous()
        y = op.launched(strided, weight, None, new_counters("cpu"))
        assert seen.pop().is_contiguous()
        assert torch.equal(y, reference.matmul(strided.contiguous(), weight))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_torchs_own_checks_of_an_operator_pass(bits, biased):
    x, weight, bias = some_problem(CPU, 6, 33, 96, bits, 32, symmetric=False)
    rest = (list(weight.words), weight.grid, bias if biased else None, new_counters("cpu"), bits, 32, False)
    for sample in (x, x.view(2, 3, 96), x.view(2, 3, 96).transpose(0, 1), x[0], x[:0]):
        torch.library.opcheck(torch.ops.llmq.packed_linear.default, (sample, *rest))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_compiled_function_serves_every_number_of_tokens(shuffled, unchecked):
    weight, _ = some_weight(33, 96, 3, 4, group_of=shuffled_groups(96, 3) if shuffled else None)
    counters, compilations = new_counters("cpu"), []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    def function(x):
        return packed_linear(x * 2, weight, None, counters) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for tokens in (2, 3, 7, 64, 65, 300):
        x = torch.randn(tokens, 96)
        assert torch.equal(compiled(x), function(x))
    assert len(compilations) == 1
    calls = [str(node.target) for node in compilations[0].graph.nodes]
    assert sum("llmq.packed_linear" in call for call in calls) == 1


def test_a_function_compiles_ahead_of_autograd_too(unchecked):
    x, weight, bias = some_problem(CPU, 6, 33, 96)
    counters = new_counters("cpu")
    compiled = torch.compile(lambda x: packed_linear(x, weight, bias, counters), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (x, x[:3], x.view(2, 3, 96)):
            assert torch.equal(compiled(tokens), packed_linear(tokens, weight, bias, counters))


KERNELS = [(16, 480), (32, 480), (64, 576), (128, 640), (256, 512), (1024, 4096), (480, 480), (129, 129), (1, 1)]
NO_KERNELS = [(1, 480), (2, 480), (8, 480), (12, 480), (24, 480), (48, 480), (96, 480), (160, 480), (240, 480)]


@pytest.mark.parametrize(("group_size", "in_features"), KERNELS + NO_KERNELS)
def test_groups_that_planes_would_straddle_have_no_kernel(group_size, in_features):
    grid = torch.zeros(in_features // group_size, 3, dtype=torch.int32)
    weight = PackedWeight((), grid, 4, group_size, in_features, True)
    for dtype, has in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False)):
        problem = op.problem_of(torch.zeros(1, in_features, dtype=dtype), weight)
        assert problem.has_kernel is (has and (group_size, in_features) in KERNELS)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("tokens", [3, 70])
def test_gradients_flow_through_a_layer_to_what_lies_below(tokens, shuffled):
    weight, dense = some_weight(32, 96, 3, 4, group_of=shuffled_groups(96, 3) if shuffled else None)
    layer = PackedLinear(weight)
    x = torch.randn(tokens, 96, requires_grad=True)
    dy = torch.randn(tokens, 32)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ dense.float(), rtol=1e-5, atol=1e-5)


def test_counters_follow_words_that_were_moved_without_them():
    layer = PackedLinear.from_codes(random_weight(48, 96, 3))
    layer.counters = new_counters("meta")  # as after load_state_dict(assign=True) from another device
    layer(torch.randn(70, 96, requires_grad=True))
    assert layer.counters.device.type == "cpu"
    assert not layer.counters.any()


@pytest.mark.parametrize("where", WHERE[:1])
@pytest.mark.parametrize("tokens", [1, 40, 257])
def test_the_gpus_path_gives_the_result_for_few_tokens_and_many(tokens, where, monkeypatch):
    monkeypatch.setattr(op, "describe", lambda device: Device("NVIDIA Nothing", 90, 4, 232448))
    monkeypatch.setattr(op, "own", lambda counters: counters)
    x, weight, bias = some_problem(where, tokens, 65, 576)
    y = op._on_gpu(x, weight, bias, new_counters(where[0]), op.problem_of(x, weight))
    assert y.shape == (tokens, 65)
    assert relative_error(y, x, weight, bias) < (TWO_ROUNDINGS if tokens > 256 else ONE_ROUNDING)[where[1]]


MOVES = {
    "cast": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: reloaded(layer),
    "same device": lambda layer: layer.to("cpu"),
}


def reloaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_a_layer_that_is_moved_gives_the_same_results(move, used, bits):
    bias = torch.arange(48.0)
    layer = PackedLinear.from_codes(random_weight(48, 96, 3, bits, symmetric=False), bias)
    inputs = [torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0)) for tokens in (3, 70)]
    outputs = [layer(x) for x in inputs] if used else None  # the int4 path keeps a second copy once it was used
    outputs = outputs or [copy.deepcopy(layer)(x) for x in inputs]
    moved = MOVES[move](layer)
    assert all(torch.equal(moved(x), y) for x, y in zip(inputs, outputs, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_a_layers_state_is_all_it_needs(bits):
    layer, other = (PackedLinear.from_codes(random_weight(48, 96, 3, bits, False, seed=seed)) for seed in (0, 1))
    state = layer.state_dict()
    assert state.keys() == {"grid", *(f"words{i}" for i in range(len(WIDTHS[bits])))}
    other.load_state_dict(state)
    for tokens in (3, 70):
        x = torch.randn(tokens, 96)
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("where", GPU)
@pytest.mark.parametrize(("bits", "group", "symmetric"), itertools.product(BITS, (16, 64, -1), (True, False)))
def test_results_on_a_gpu_are_float64s_and_the_same_bits_each_time(bits, group, symmetric, where):
    for tokens in (1, 7, 16, 64, 256, 300):
        x, weight, bias = some_problem(where, tokens, 200, 1088, bits, group, symmetric)
        counters = new_counters("cuda")
        results = [packed_linear(x, weight, bias, counters) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results)
        assert relative_error(results[0], x, weight, bias) < TWO_ROUNDINGS[where[1]]
        assert not counters.any()


@pytest.mark.smoke
@pytest.mark.parametrize("where", GPU)
def test_a_layer_may_run_on_several_streams_at_once(where):
    x, weight, bias = some_problem(where, 4, 256, 8192)
    counters, streams = new_counters("cuda"), [torch.cuda.Stream() for _ in range(4)]
    alone = packed_linear(x, weight, bias, counters)
    torch.cuda.synchronize()
    results = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            results.append(packed_linear(x, weight, bias, counters))
    torch.cuda.synchronize()
    assert all(torch.equal(result, alone) for result in results)
    assert not counters.any()


@pytest.mark.smoke
@pytest.mark.parametrize("where", GPU)
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_captured_graph_replays_with_new_inputs(tokens, where):
    x, weight, bias = some_problem(where, tokens, 200, 4096)
    counters = new_counters("cuda")
    packed_linear(x, weight, bias, counters)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed_linear(x, weight, bias, counters)
    for seed in range(3):
        x.copy_(some_problem(where, tokens, 200, 4096, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, packed_linear(x, weight, bias, counters))


@pytest.mark.smoke
@pytest.mark.parametrize("where", GPU)
def test_a_compiled_function_runs_on_a_gpu(where, unchecked):
    _, weight, bias = some_problem(where, 1, 200, 1088)
    counters = new_counters("cuda")
    compiled = torch.compile(lambda x: packed_linear(x, weight, bias, counters), fullgraph=True, dynamic=True)
    for tokens in (2, 16, 300):
        x = some_problem(where, tokens, 200, 1088)[0]
        assert torch.equal(compiled(x), packed_linear(x, weight, bias, counters))


@pytest.mark.gpu
def test_groups_without_a_kernel_are_computed_on_a_gpu_too():
    x, weight, bias = some_problem(("cuda", torch.float16), 7, 33, 480, 4, 96)
    assert torch.equal(linear(x, weight, bias), matmul(x, weight, bias))
    y = linear(x.float(), weight, bias.float())
    torch.testing.assert_close(y.double().cpu(), expected(x, weight, bias), rtol=1e-5, atol=1e-5)
