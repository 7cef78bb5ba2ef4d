"""Check a checkpoint on disk: read every tensor, compare it with the digest of the computed one, run the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.digests import DigestingCheckpoint
from llmq.checkpoint.module_matching import check_fit, read_linear
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError
from llmq.models.model_source import build_skeleton, read_generation_config
from llmq.models.stored_names import has_no_place, is_computed
from llmq.runtime.load import load, open_tokenizer
from llmq.runtime.model_config import model_config
from llmq.verification.on_demand import read_when_called

DIGESTS = "digests"  # key of the report entry with the digests of all computed tensors
_TOKENS = 16


def check(directory: Path, digests: Mapping[str, str] | None, trust_remote_code: bool = False) -> list[str]:
    """Run a checkpoint with one block in memory at a time, and compare what was read with what was computed.

    Returns the names of the tensors that the model has no place for.

    `digests`: of every packed linear and other tensor, as computed; None if they are not known.

    Raises CheckpointError if a tensor cannot be decoded, is missing, does not fit the model or differs from the
    computed one, or if the logits of the model are not finite.
    """
    return check_and_digest(directory, digests, trust_remote_code)[0]


@torch.no_grad()
def check_and_digest(
    directory: Path, digests: Mapping[str, str] | None, trust_remote_code: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Return what `check` returns, and the digests of all tensors that were read."""
    checkpoint = DigestingCheckpoint(directory)
    if digests is not None:
        names = [*checkpoint.linears, *checkpoint.other_names]
        compare(dict.fromkeys(names, ""), dict.fromkeys(digests, ""))
    model = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
    view = checkpoint.for_model(model)
    check_fit(model, view)
    read_generation_config(model, directory)
    finite = _is_finite(model, view, trust_remote_code)
    _read_others(model, checkpoint, view)
    if digests is not None:
        compare(checkpoint.digests, digests)
    if not finite:
        raise CheckpointError(f"{directory}: the model computes NaN or infinity")
    others = sorted(set(view.other_names) - model.state_dict().keys())
    return [n for n in others if has_no_place(model, n) and not is_computed(model, n)], checkpoint.digests


def tokenizer_fault(directory: Path, trust_remote_code: bool = False) -> str | None:
    """Return why the tokenizer in a directory cannot be opened; None if it can, or if there is none."""
    if not any(directory.glob("token*")):
        return None
    try:
        open_tokenizer(directory, trust_remote_code)
    except CheckpointError as error:
        return str(error)
    return None


def compare(stored: Mapping[str, str], computed: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the stored tensors have the names and digests of the computed ones."""
    names = sorted({*stored, *computed})
    differing = [name for name in names if stored.get(name) != computed.get(name)]
    if differing:
        name = differing[0]
        fault = "is not what was computed" if name in stored and name in computed else "is on one side only"
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckpointError(f"the checkpoint on disk is damaged: {name} {fault}{more}; quantize again")


def _is_finite(model: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> bool:
    """Return whether the logits of a few tokens are finite."""

    def run(model: Any) -> bool:
        ids = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
        return bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())

    read_when_called(model, checkpoint)
    try:
        return run(model)
    except CheckpointError:
        raise
    except Exception:  # any modelling code may use a weight outside of blocks without calling its module
        return run(load(checkpoint.directory, "cpu", torch.float32, trust_remote_code))


def _read_others(model: Any, checkpoint: DigestingCheckpoint, view: Checkpoint) -> None:
    """Read the tensors that the run did not need: experts without tokens, linears that never run, biases of zeros."""
    for name in view.linears:
        if view.stored_linear(name) not in checkpoint.digests:
            read_linear(model, view, name)
    for name in checkpoint.other_names:
        if name not in checkpoint.digests:
            checkpoint.read(name)
