"""What tuning measures with: data, the check of results, and the bookkeeping of CUDA graphs, on a pretend GPU."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from llmq_kernels import trial as module
from llmq_kernels.choose import Problem, Tile
from llmq_kernels.layout import unpack
from llmq_kernels.trial import Trial, least_seconds, nbytes, random_codes, rotated, time_graph
from weights import BITS, some_weight

CPU = torch.device("cpu")
PROBLEM = Problem(4, 64, True, "float16", 3, 24, 128)
TILE = Tile(8, 64, 4, 3)


@pytest.fixture
def multiply(monkeypatch):
    """Stands in for the kernels; a test may set what it adds to the right result."""

    def fake(x, weight, tile, counters, y=None):
        fake.calls.append((weight, tile))
        return module.reference.matmul(x, weight) + fake.wrong(len(fake.calls))

    fake.calls, fake.wrong = [], lambda call: 0
    monkeypatch.setattr(module, "multiply", fake)
    return fake


def one_each(launches, least, replays=20):
    """A timer that makes every launch once, and finds the third slowest."""
    for launch in launches:
        launch()
    return [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_random_weights_are_those_of_the_problem(bits, symmetric):
    codes, scale, zero = random_codes(replace(PROBLEM, bits=bits, symmetric=symmetric), CPU)
    assert (codes.shape, scale.shape, zero.shape) == ((24, 128), (24, 2), (24, 2))
    assert int(codes.max()) == 2**bits - 1
    assert scale.dtype == torch.float16
    assert bool((zero == 2 ** (bits - 1)).all()) == symmetric
    W = (codes.double() - zero.double().repeat_interleave(64, 1)) * scale.double().repeat_interleave(64, 1)
    assert 0.01 < float(W.std()) < 0.05


def test_the_rotation_has_as_many_bytes_as_asked_for_in_different_memory():
    weight, _ = some_weight(24, 128, 2, 3)
    copies = rotated(weight, 3.5 * nbytes(weight))
    assert len(copies) == 4
    assert copies[0] is weight
    assert len({array.data_ptr() for copy in copies for array in (*copy.words, copy.grid)}) == 4 * 3
    assert all(torch.equal(unpack(copy), unpack(weight)) for copy in copies)
    assert len(rotated(weight, 1)) == 2


def test_a_right_tile_is_timed_over_the_whole_rotation(multiply):
    assert Trial(CPU, one_each, rotation=10_000)(PROBLEM, TILE) == 2.0
    timed = {id(weight) for weight, _ in multiply.calls[2:]}
    assert len(timed) == len(multiply.calls) - 2 == 4
    assert {tile for _, tile in multiply.calls} == {TILE}


@pytest.mark.parametrize("wrong", [0.1, float("nan"), float("inf")])
def test_a_tile_with_a_wrong_result_is_not_timed(multiply, wrong):
    multiply.wrong = lambda call: wrong
    with pytest.raises(ValueError, match="off by"):
        Trial(CPU, one_each, rotation=1)(PROBLEM, TILE)
    assert len(multiply.calls) == 2


def test_a_tile_whose_result_changes_is_not_timed(multiply):
    multiply.wrong = lambda call: 1e-4 * call
    with pytest.raises(ValueError, match="different bits"):
        Trial(CPU, one_each, rotation=1)(PROBLEM, TILE)


def test_rounding_is_no_error(multiply):
    generator = torch.Generator().manual_seed(0)
    noise = 1e-4 * torch.randn(3, 24, generator=generator).half()
    multiply.wrong = lambda call: noise
    assert Trial(CPU, one_each, rotation=1)(PROBLEM, TILE) == 2.0


def test_no_gpu_is_expected_to_be_faster_than_its_memory_or_its_tensor_cores():
    large = replace(PROBLEM, N=8192, K=8192)
    assert least_seconds(large) == pytest.approx(8192 * 8192 / 2 / 5e12)
    assert least_seconds(replace(large, M=4096)) == pytest.approx(2 * 4096 * 8192 * 8192 / 1e15)


class PretendGpu:
    """The parts of torch.cuda that time_graph uses; a launch takes `launch_ms`."""

    def __init__(self, launch_ms):
        self.launch_ms, self.now, self.capturing, self.captured, self.eager = launch_ms, 0.0, False, 0, 0
        self.collected_in_capture = []

    def launch(self):
        if self.capturing:
            self.captured += 1
            self.collected_in_capture.append(gc.isenabled())
        else:
            self.eager += 1

    def replay(self):
        self.now += self.captured * self.launch_ms

    def graph(self, graph, stream):
        return self

    stream = graph  # both are entered and left

    def __enter__(self):
        self._depth = getattr(self, "_depth", 0) + 1
        self.capturing = self._depth == 1 and self.eager > 0
        return self

    def __exit__(self, *_):
        self._depth -= 1
        self.capturing = False


def pretend(monkeypatch, launch_ms):
    gpu = PretendGpu(launch_ms)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, end):
            return end.at - self.at

    cuda = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None), current_stream=lambda: None,
        stream=lambda stream: gpu, graph=gpu.graph, CUDAGraph=lambda: gpu, Event=Event, synchronize=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(module.torch, "cuda", cuda)
    module._side_stream.cache_clear()
    return gpu


@pytest.mark.parametrize(
    ("copies", "least", "nodes"),
    [(24, 2e-6, 288), (2, 30e-6, 34), (1, 1e-2, 1), (5, 1e-9, 300)],
    ids=["small", "large", "huge", "nothing"],
)
def test_a_graph_is_long_enough_to_time_and_goes_through_all_copies_alike(monkeypatch, copies, least, nodes):
    gpu = pretend(monkeypatch, launch_ms=0.25)
    seconds = time_graph([gpu.launch] * copies, least, replays=7)
    assert gpu.captured == nodes
    assert nodes % copies == 0
    assert seconds == pytest.approx([0.25e-3] * 7)
    module._side_stream.cache_clear()


def test_the_first_launch_compiles_before_the_capture_in_which_nothing_is_collected(monkeypatch):
    gpu = pretend(monkeypatch, launch_ms=1.0)
    time_graph([gpu.launch] * 3, 1e-3)
    assert gpu.eager == 1
    assert gpu.collected_in_capture == [False] * gpu.captured
    assert gc.isenabled()
    module._side_stream.cache_clear()
