"""What each checkpoint format can store, as far as a request says it: checked before any work."""

from llmq.core.errors import RequestError
from llmq.core.settings import GGUF_GROUPS, GPTQ_BITS, MLX_GROUPS, Grid, listed


def check_format(name: str, bits: tuple[int, ...], grid: Grid, default_group: int) -> None:
    """Raise RequestError if a format cannot store what is asked for.

    Args:
        bits: all numbers of bits that any layer is to have, from the fewest.
        grid: as asked for; its bits do not matter here.
        default_group: the group size of a request that names none.
    """
    if name == "gptq" and not fits_gptq(bits):
        rule = f"format gptq stores {listed(GPTQ_BITS)} bits per weight"
        raise RequestError(f"{rule}; got {listed(bits)}; use compressed-tensors or mlx")
    if name == "awq" and bits != (4,):
        raise RequestError("format awq stores 4-bit weights only; use gptq or compressed-tensors for others")
    if name == "mlx" and grid.group_size not in MLX_GROUPS:
        raise RequestError(f"format mlx stores groups of {listed(MLX_GROUPS)}; got groups of {grid.group_size}")
    if name == "gguf":
        _check_gguf(bits, grid, default_group)


def _check_gguf(bits: tuple[int, ...], grid: Grid, default_group: int) -> None:
    if not grid.symmetric or not GGUF_GROUPS.keys() >= set(bits):
        what = f"{listed(bits)} bit" + ("" if grid.symmetric else " with zero points")
        raise RequestError(f"format gguf stores symmetric weights of {listed((*GGUF_GROUPS,))} bit; got {what}")
    if grid.group_size not in (default_group, gguf_group(bits)):
        rule = f"format gguf has groups of {gguf_group(bits)} at {listed(bits)} bit"
        raise RequestError(f"{rule}, which llmq chooses itself; got {grid.group_size}; remove --group-size")


def fits_gptq(bits: tuple[int, ...]) -> bool:
    """Return whether readers of GPTQ files know all of these numbers of bits."""
    return set(bits) <= set(GPTQ_BITS)


def gguf_group(bits: tuple[int, ...]) -> int:
    """Return the group size of a GGUF file: what the largest of its blocks holds."""
    return max(GGUF_GROUPS.get(each, 0) for each in bits)
