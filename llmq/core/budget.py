"""What a run may spend instead of a number of bits: bits per weight on average (`--budget`), or bytes (`--size`)."""

import re
from dataclasses import dataclass
from typing import Any

from llmq.core.errors import RequestError
from llmq.core.settings import BITS, GGUF_GROUPS, GPTQ_BITS, listed

_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Budget:
    """What a run may spend; one of the two is None."""

    bits: float | None  # stored bits per packed weight on average, with scales
    nbytes: int | None  # of all files of the checkpoint but llmq's reports
    widths: tuple[int, ...]  # bits that a layer may get, from the fewest


def spending_of(budget: Any, size: Any, widths: Any) -> dict[str, Any]:
    """Return what people pass in Python as a number, a text and whole numbers. Raises RequestError else."""
    try:
        budget = 0.0 if budget is None else float(budget)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"budget must be a number of bits, such as 3.5; got {budget!r}") from None
    if not isinstance(size, str | int) or isinstance(size, bool):
        raise RequestError(f"size is a number with a unit, such as 2.5GB or 700MiB; got {size!r}")
    try:
        given = (widths,) if isinstance(widths, str | int) else tuple(widths)
        whole = tuple(int(width) for width in given)
        if any(not isinstance(given[i], str) and whole[i] != given[i] for i in range(len(whole))):
            raise ValueError
    except (TypeError, ValueError):
        raise RequestError(f"widths must be whole numbers, such as 4 8; got {widths!r}") from None
    return {"budget": budget, "size": str(size), "widths": whole}


def budget_of(bits: float, size: str, widths: tuple[int, ...], stored_as: str) -> Budget | None:
    """Return the budget of a request; None if it has none.

    Raises RequestError for a budget that no checkpoint can meet, or for bits that do not exist.
    """
    if not (bits or size):
        if widths:
            raise RequestError(f"widths belong to --budget or --size; got widths {listed(widths)} without either")
        return None
    if bits and size:
        raise RequestError(f"pass one of budget and size; got budget {bits:g} and size {size}")
    if bits and not min(BITS) < bits <= 2 * max(BITS):
        raise RequestError(f"budget counts stored bits per weight, more than {min(BITS)}; got {bits:g}")
    if stored_as == "awq":
        raise RequestError("format awq stores 4-bit weights only, so a budget leaves no choice; use compressed-tensors")
    if unknown := set(widths) - set(BITS):
        raise RequestError(f"widths must be among {listed(BITS)}; got {listed(tuple(sorted(unknown)))}")
    return Budget(bits or None, bytes_of(size) if size else None, tuple(sorted(set(widths or _known(stored_as)))))


def _known(stored_as: str) -> tuple[int, ...]:
    """Return the bits that a format has."""
    return {"gptq": GPTQ_BITS, "gguf": tuple(sorted(GGUF_GROUPS))}.get(stored_as, BITS)


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as 2.5GB, 700 MiB or 123456. Raises RequestError if it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", size.upper())
    if found is None:
        raise RequestError(f"size is a number with a unit, such as 2.5GB or 700MiB; got {size!r}")
    return int(min(float(found[1]), 1e18) * _SCALES[found[2] or ""])  # no disk is larger
