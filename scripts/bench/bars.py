"""The targets, (must, stretch). Set before the first GPU run, from byte counts, compiled instruction counts and other
projects' published numbers (design document, section 7); a missed one is a finding, not a reason to move it."""

from __future__ import annotations

Bar = tuple[float, float]

_SMALL, _NARROW, _SHORT = (4096, 4096), (11008, 4096), (4096, 11008)
_MIDDLE, _TALL, _LONG = (8192, 8192), (28672, 8192), (8192, 28672)


def _by_shape(small: Bar, narrow: Bar, middle: Bar, large: Bar) -> dict[tuple[int, int], Bar]:
    return {_SMALL: small, _NARROW: narrow, _SHORT: narrow, _MIDDLE: middle, _TALL: large, _LONG: large}


# One token, W4 g128: the part of the time that reading the bytes at the measured bandwidth takes.
FRACTION = _by_shape((0.47, 0.65), (0.70, 0.82), (0.77, 0.88), (0.88, 0.94))

# Times as fast as cuBLAS with bf16 weights, by tokens and shape.
SPEEDUP = {
    1: _by_shape((2.2, 3.0), (2.7, 3.2), (3.0, 3.4), (3.3, 3.55)),
    16: _by_shape((1.9, 2.6), (2.5, 3.0), (2.7, 3.2), (3.0, 3.4)),
    64: _by_shape((1.3, 1.8), (1.6, 2.2), (1.7, 2.3), (1.8, 2.4)),
    128: _by_shape((1.0, 1.2), (1.05, 1.3), (1.05, 1.3), (1.1, 1.35)),
    256: _by_shape((0.65, 0.80), (0.65, 0.85), (0.65, 0.85), (0.65, 0.85)),
    1024: _by_shape((0.78, 0.88), (0.80, 0.90), (0.80, 0.90), (0.80, 0.90)),
    4096: _by_shape((0.93, 0.97), (0.93, 0.97), (0.93, 0.97), (0.93, 0.97)),
}

# Times as fast as a peer, geometric mean over the shapes, by tokens.
PEERS: dict[str, dict[int, Bar]] = {
    "tinygemm": {1: (1.3, 1.45), 8: (2.0, 2.4), 16: (3.0, 4.0), 64: (8.0, 11.0)},
    "gemlite": {1: (1.6, 2.0)}
    | dict.fromkeys((2, 4, 8, 16, 32), (2.0, 2.5))
    | dict.fromkeys((64, 128, 256), (1.5, 2.0))
    | dict.fromkeys((1024, 4096), (1.8, 2.3)),
}

# One token, 8192x8192 and larger, times as fast as cuBLAS with bf16 weights, by bits.
WIDTHS: dict[int, Bar] = {8: (1.7, 1.85), 3: (3.7, 4.3), 2: (4.8, 5.8)}

# A decode step of LLaMA-7B's shape, batch 1.
TOKENS_PER_SECOND: Bar = (600.0, 760.0)
TIMES_BF16: Bar = (2.3, 2.9)

# Relative Frobenius error against float64, by dtype: y is rounded once; where W is made dense or scaled before the
# product it is rounded too. The second pair is tests/kernels/oracle.py's.
ONE_ROUNDING = {"float16": 3e-4, "bfloat16": 2.5e-3}
TWO_ROUNDINGS = {"float16": 5e-4, "bfloat16": 4e-3}
