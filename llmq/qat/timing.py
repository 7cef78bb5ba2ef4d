"""How long a training takes: the parts of one step are timed here, with random weights of the right shapes."""

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmq.calibration.block_runner import Compute
from llmq.core.quantized_weight import QuantizedWeight
from llmq.qat.request import TrainRequest
from llmq.qat.trainer import optimizer_of
from llmq.training.learnable_weight import Latent

_LEAST = 0.2  # seconds that a part is timed for, at least
_SOME = 1 << 20  # parameters whose optimizer step is timed
GROUP = 64  # weights that share a scale; other sizes take about the same


def seconds(request: TrainRequest) -> float:
    """Return the seconds of a whole training: its steps, and the measurements on held-out sequences."""
    config, data = request.config, request.data
    tokens = config.micro_batch * data.tokens // len(data.train)
    forward, backward = _blocks(request, max(2, tokens))
    head = _head(request, tokens)
    original = (forward + head) * config.needs_original
    micro = forward * (1 + config.checkpointing) + backward + 3 * head + original
    step = config.batch // config.micro_batch * micro + _optimizer(request)
    measured = len(data.held_out) / config.micro_batch * (config.checks + 1) * (forward + head + original)
    return config.steps * step + measured


def _blocks(request: TrainRequest, tokens: int) -> tuple[float, float]:
    """Return the seconds that the linears and the attention of all blocks take, forwards and backwards."""
    config, compute = request.config, request.compute
    linears = [request.skeleton.get_submodule(name) for name in request.packed_names]
    forward = backward = 0.0
    for (inputs, outputs), count in Counter((each.in_features, each.out_features) for each in linears).items():
        latent = _latent(inputs, outputs, compute, config.learn != "scales")
        x = torch.randn(tokens, inputs, device=compute.device, dtype=compute.precision, requires_grad=True)
        once = _timed(lambda latent=latent, x=x: latent.times(x), compute)
        forward += count * once
        backward += count * (_timed(lambda latent=latent, x=x: latent.times(x).sum().backward(), compute) - once)
    once, both = _attention(request, tokens)
    return forward + once, backward + both - once


def _latent(inputs: int, outputs: int, compute: Compute, codes: bool) -> Latent:
    groups = inputs // GROUP if inputs % GROUP == 0 else 1
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=compute.device)
    scale = torch.full((outputs, groups), 0.01, device=compute.device)
    latent = Latent(QuantizedWeight(q, scale, torch.full_like(scale, 8, dtype=torch.uint8), 4), codes=codes)
    return latent.requires_grad_()


def _attention(request: TrainRequest, tokens: int) -> tuple[float, float]:
    """Return the seconds of the attention of all blocks: forwards, and both ways. None has any: 0."""
    text, compute = request.skeleton.config.get_text_config(), request.compute
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0.0, 0.0
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    length = tokens // request.config.micro_batch
    shape = (request.config.micro_batch, heads, max(1, length), size)
    x = torch.randn(shape, device=compute.device, dtype=compute.precision, requires_grad=True)

    def attention() -> Tensor:
        return scaled_dot_product_attention(x, x, x, is_causal=True)

    depth = text.num_hidden_layers
    return depth * _timed(attention, compute), depth * _timed(lambda: attention().sum().backward(), compute)


def _head(request: TrainRequest, tokens: int) -> float:
    """Return the seconds of the product with all words of the vocabulary."""
    text, compute = request.skeleton.config.get_text_config(), request.compute
    x, W = (
        torch.randn(rows, text.hidden_size, device=compute.device, dtype=compute.precision)
        for rows in (max(1, tokens), text.vocab_size)
    )
    return _timed(lambda: x @ W.T, compute)


def _optimizer(request: TrainRequest) -> float:
    """Return the seconds of one step of the optimizer."""
    config, packed = request.config, sum(request.sizes.values())
    learning = packed // GROUP  # LoRA has about as many
    if config.learn != "scales":
        learning += packed
    if config.learn == "all":
        learning += request.outside
    some = torch.zeros(_SOME, device=request.compute.device, requires_grad=True)
    some.grad = torch.zeros_like(some)
    optimizer, _ = optimizer_of([{"params": [some], "lr": 1e-4}], config.steps)
    return learning / _SOME * _timed(optimizer.step, request.compute)


def _timed(work: Callable[[], object], compute: Compute) -> float:
    """Return the seconds that one of many calls takes."""
    with torch.enable_grad():
        work()
        begin, calls = time.perf_counter(), 0
        while time.perf_counter() - begin < _LEAST:
            work()
            calls += 1
            if compute.device.type == "cuda":
                torch.cuda.synchronize(compute.device)
    return (time.perf_counter() - begin) / calls
