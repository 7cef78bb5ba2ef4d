"""The bars: targets for each measurement, as pairs (must, stretch).

They were set before the first run on a GPU, from byte counts, compiled instruction counts, and numbers that other
projects published (design document, section 7). A bar that is missed is a finding. It is no reason to change the bar.
"""

from __future__ import annotations

Bar = tuple[float, float]

_SMALL, _NARROW, _SHORT = (4096, 4096), (11008, 4096), (4096, 11008)
_MIDDLE, _TALL, _LONG = (8192, 8192), (28672, 8192), (8192, 28672)


def _by_shape(small: Bar, narrow: Bar, middle: Bar, large: Bar) -> dict[tuple[int, int], Bar]:
    return {_SMALL: small, _NARROW: narrow, _SHORT: narrow, _MIDDLE: middle, _TALL: large, _LONG: large}


# One token, 4 bit, groups of 128: seconds for reading the bytes at the measured bandwidth, divided by our seconds.
FRACTION = _by_shape((0.47, 0.65), (0.70, 0.82), (0.77, 0.88), (0.88, 0.94))

# Speed-up over cuBLAS with bf16 weights, by tokens and shape.
SPEEDUP = {
    1: _by_shape((2.2, 3.0), (2.7, 3.2), (3.0, 3.4), (3.3, 3.55)),
    16: _by_shape((1.9, 2.6), (2.5, 3.0), (2.7, 3.2), (3.0, 3.4)),
    64: _by_shape((1.3, 1.8), (1.6, 2.2), (1.7, 2.3), (1.8, 2.4)),
    128: _by_shape((1.0, 1.2), (1.05, 1.3), (1.05, 1.3), (1.1, 1.35)),
    256: _by_shape((0.65, 0.80), (0.65, 0.85), (0.65, 0.85), (0.65, 0.85)),
    1024: _by_shape((0.78, 0.88), (0.80, 0.90), (0.80, 0.90), (0.80, 0.90)),
    4096: _by_shape((0.93, 0.97), (0.93, 0.97), (0.93, 0.97), (0.93, 0.97)),
}

# What the kernels are built for: the speed-up over cuBLAS with bf16 weights at 8192x8192, in one run, by tokens.
GOAL_SHAPE = _MIDDLE
GOALS = {1: 3.0, 16: 3.0, 64: 2.0, 256: 0.85, 4096: 0.97}

# Speed-up over a peer by tokens: geometric mean over the shapes.
PEERS: dict[str, dict[int, Bar]] = {
    "tinygemm": {1: (1.3, 1.45), 8: (2.0, 2.4), 16: (3.0, 4.0), 64: (8.0, 11.0)},
    "gemlite": {1: (1.6, 2.0)}
    | dict.fromkeys((2, 4, 8, 16, 32), (2.0, 2.5))
    | dict.fromkeys((64, 128, 256), (1.5, 2.0))
    | dict.fromkeys((1024, 4096), (1.8, 2.3)),
}

# One token, 8192x8192 and larger: speed-up over cuBLAS with bf16 weights, by bits.
WIDTHS: dict[int, Bar] = {8: (1.7, 1.85), 6: (1.9, 2.3), 5: (2.3, 2.8), 3: (3.7, 4.3), 2: (4.8, 5.8)}

# A layer of experts of Qwen3-30B-A3B's shape, by tokens: speed-up over transformers' grouped matmul with bf16 weights.
EXPERTS = {1: 2.5, 8: 2.5, 32: 2.5}

# Quantizing a block of LLaMA-7B's shape with GPTQ, effort normal, on 128 x 2048 tokens: seconds, and bytes of the GPU.
BLOCK_SECONDS, BLOCK_BYTES = 3.5, 16e9

# One decode step of a model with LLaMA-7B's shape, batch 1. TIMES_BF16 is the speed-up over the bf16 model.
# LOADED_TIMES_BF16: the same with llmq.load and llmq.fast_generate, for both models.
TIMES_BF16: Bar = (2.3, 2.9)
LOADED_TIMES_BF16 = 2.6
_TOKENS_PER_SECOND: Bar = (600.0, 760.0)
READ_RATE = 4.3e12  # bytes per second, of the GPU that they were set for (an H200)


def tokens_per_second(read_rate: float) -> Bar:
    """Return the bar for tokens per second on a GPU that reads so many bytes per second."""
    must, stretch = (bar * read_rate / READ_RATE for bar in _TOKENS_PER_SECOND)
    return must, stretch


# Seconds until the kernels of a model are compiled, by as many processes as there are cores.
COLD_START = 10

# Largest relative Frobenius error against float64, by dtype. y is always rounded once. If W is dequantized or scaled
# before the product, W is rounded too; these bars are those of tests/kernels/oracle.py.
ONE_ROUNDING = {"float16": 3e-4, "bfloat16": 2.5e-3}
TWO_ROUNDINGS = {"float16": 5e-4, "bfloat16": 4e-3}
