"""Whether a checkpoint on disk is what was computed, and computes: its files are read again, all of them, and run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.digests import Noted
from llmq.checkpoint.module_matching import check_fit, fitting
from llmq.core.errors import CheckpointError
from llmq.models.model_source import build_skeleton, read_generation_config
from llmq.runtime.load import load
from llmq.runtime.model_config import model_config
from llmq.verification.on_demand import read_when_called

DIGESTS = "digests"
"""Entry of the report that says what was computed."""
_TOKENS = 16


@torch.no_grad()
def check(directory: Path, digests: Mapping[str, str] | None, trust_remote_code: bool = False) -> None:
    """Run a checkpoint in the memory of one block, and compare what was read with what was computed.

    Args:
        digests: of every packed linear and other tensor as they were computed; None where nobody wrote them down.

    Raises CheckpointError if a tensor cannot be decoded, is missing, does not fit the model or differs from what was
    computed, or if the model's logits are not finite.
    """
    checkpoint = Noted(directory)
    if digests is not None:
        names = [*checkpoint.linears, *checkpoint.other_names]
        compare(dict.fromkeys(names, ""), dict.fromkeys(digests, ""))
    model = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
    check_fit(model, checkpoint)
    read_generation_config(model, directory)
    finite = _is_finite(model, checkpoint, trust_remote_code)
    _read_rest(model, checkpoint)
    if digests is not None:
        compare(checkpoint.digests, digests)
    if not finite:
        raise CheckpointError(f"{directory}: the model computes NaN or infinity")


def compare(found: Mapping[str, str], computed: Mapping[str, str]) -> None:
    """Raise CheckpointError unless these tensors are those."""
    names = sorted({*found, *computed})
    differing = [name for name in names if found.get(name) != computed.get(name)]
    if differing:
        name = differing[0]
        what = "is not what was computed" if name in found and name in computed else "is on one side only"
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckpointError(f"the checkpoint on disk is damaged: {name} {what}{more}; quantize again")


def _is_finite(model: Any, checkpoint: Noted, trust_remote_code: bool) -> bool:
    """Whether the logits of a few tokens are."""

    def run(model: Any) -> bool:
        ids = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
        return bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())

    read_when_called(model, checkpoint)
    try:
        return run(model)
    except CheckpointError:
        raise
    except Exception:  # of any modelling code; it may use weights outside of blocks without calling what holds them
        return run(load(checkpoint.directory, "cpu", torch.float32, trust_remote_code))


def _read_rest(model: Any, checkpoint: Noted) -> None:
    """Read what no token came by: experts, linears that never run, biases of zeros."""
    for name in checkpoint.linears:
        if name not in checkpoint.digests:
            fitting(model, checkpoint, name)
    for name in checkpoint.other_names:
        if name not in checkpoint.digests:
            checkpoint.read(name)
