"""Whether a checkpoint on disk is what was computed, and computes: it is opened again, decoded whole, and run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint import Checkpoint
from llmq.digest import digests_of
from llmq.errors import CheckpointError
from llmq.load import load

DIGESTS = "digests"
"""Entry of the report that says what was computed."""
_TOKENS = 16


def check(directory: Path, digests: Mapping[str, str] | None, trust_remote_code: bool = False) -> Any:
    """The loaded model (float32, on the CPU) of a sound checkpoint.

    Args:
        digests: of every packed linear and other tensor as they were computed; None where nobody wrote them down.

    Raises CheckpointError if a tensor cannot be decoded, is missing, or differs from what was computed, or if the
    model's logits are not finite.
    """
    if digests is not None:
        compare(digests_of(Checkpoint(directory)), digests)
    model = load(directory, "cpu", torch.float32, trust_remote_code)
    ids = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(f"{directory}: the model computes NaN or infinity")
    return model


def compare(found: Mapping[str, str], computed: Mapping[str, str]) -> None:
    """Raise CheckpointError unless these tensors are those."""
    names = sorted({*found, *computed})
    differing = [name for name in names if found.get(name) != computed.get(name)]
    if differing:
        name = differing[0]
        what = "is not what was computed" if name in found and name in computed else "is on one side only"
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckpointError(f"the checkpoint on disk is damaged: {name} {what}{more}; quantize again")
