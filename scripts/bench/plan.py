"""Define what a benchmark measures: a full plan for a GPU, and a toy plan for the same code in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]
"""(N, K): outputs and inputs of a linear layer."""


@dataclass(frozen=True)
class Grid:
    """The problems that are compared with float64 before anything is timed."""

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    """Inputs per group; -1 means a whole row."""
    dtypes: tuple[str, ...]
    tokens: tuple[int, ...]
    outputs: int
    """Rows of W. The number is odd, so that the last tile of rows is not full."""
    inputs: int
    """Approximate columns of W. They are rounded to an odd number of groups, so that the last block is not full."""
    even: Shape
    """A shape that fills whole blocks. It is checked with the first number of tokens."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of the LLaMA model for timing decode steps, generation and quantization."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    replays: int


@dataclass(frozen=True)
class Generation:
    """Tokens of the prompt and new tokens, of one sequence."""

    prompt: int
    new: int


@dataclass(frozen=True)
class Quantizing:
    """A run of GPTQ on the first blocks of the decoder."""

    blocks: int
    samples: int
    length: int


@dataclass(frozen=True)
class Experts:
    """Sizes of a layer of experts, and how many tokens it is timed with."""

    experts: int
    top: int
    hidden: int
    intermediate: int
    tokens: tuple[int, ...]
    draws: int
    """Number of routings that a timing goes through."""


@dataclass(frozen=True)
class Plan:
    """All that one benchmark measures. `first` and `later` are numbers of tokens; `first` is measured first."""

    shapes: tuple[Shape, ...]
    dtype: str
    group: int
    first: tuple[int, ...]
    later: tuple[int, ...]
    tiles: int
    """Most tiles that tuning tries for a problem."""
    widths: tuple[int, ...]
    """Bits other than 4. They are measured at one token, on shapes with at least `wide` weights."""
    wide: int
    rotation: float
    """Bytes of weights that are read before the same weight is read again."""
    replays: int
    read_bytes: int
    square: int
    """Rows and columns of two matrices; their product measures the tensor cores."""
    nodes: int
    """Number of launches in the graph that measures the time between launches."""
    grid: Grid
    decoder: Decoder
    generation: Generation
    quantizing: Quantizing
    experts: Experts
    tinygemm_up_to: int
    """Most tokens that tinygemm is timed with. It reads all weights again for every 16 tokens, so it gets very slow."""


FULL = Plan(
    shapes=((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)),
    dtype="bfloat16",
    group=128,
    first=(1, 16, 64, 128),
    later=(256, 1024, 4096, 8, 32, 2, 4, 512),
    tiles=20,
    widths=(2, 3, 5, 6, 8),
    wide=8192 * 8192,
    rotation=200e6,
    replays=20,
    read_bytes=4 << 30,
    square=8192,
    nodes=200,
    grid=Grid(
        bits=(5, 3, 6, 4, 2, 8),  # kernels of 16 planes take longest to compile
        groups=(16, 32, 64, 128, 256, -1),
        dtypes=("bfloat16", "float16"),
        tokens=(1, 2, 3, 8, 16, 33, 100, 300),
        outputs=203,
        inputs=1000,
        even=(256, 2048),
    ),
    decoder=Decoder(4096, 11008, 32, 32, 32000, 128, 100),
    generation=Generation(32, 128),
    quantizing=Quantizing(3, 128, 2048),
    experts=Experts(128, 8, 2048, 768, (1, 8, 32), 16),  # Qwen3-30B-A3B
    tinygemm_up_to=512,
)

# The interpreter computes bfloat16 wrongly, so our kernels run in float16 there.
TOY = Plan(
    shapes=((48, 128),),
    dtype="float16",
    group=64,
    first=(1,),
    later=(64,),
    tiles=2,
    widths=(8,),
    wide=0,
    rotation=1,
    replays=2,
    read_bytes=1 << 16,
    square=64,
    nodes=3,
    grid=Grid(bits=(4, 8), groups=(64,), dtypes=("float16",), tokens=(3,), outputs=17, inputs=100, even=(16, 512)),
    decoder=Decoder(64, 128, 2, 4, 128, 8, 2),
    generation=Generation(4, 4),
    quantizing=Quantizing(2, 10, 16),
    experts=Experts(4, 2, 128, 64, (3,), 1),
    tinygemm_up_to=64,
)
