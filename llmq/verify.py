"""python -m llmq.verify DIR: is a packed checkpoint sound, is it what was computed, how far is it from the original."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from llmq.check import DIGESTS, check
from llmq.checkpoint import Checkpoint, is_packed
from llmq.cli import Positional, run
from llmq.data import evaluation_chunks, read_text
from llmq.errors import CheckpointError, RequestError
from llmq.evaluate import evaluate, logits_of
from llmq.files import read_json
from llmq.hub import locate
from llmq.load import load, load_any
from llmq.output import REPORT
from llmq.source import ModelSource


@dataclass(frozen=True)
class VerifyConfig:
    """Decode every tensor, compare with what llmq wrote down when it computed them, and run the model.

    Exit code 0 means that the checkpoint is sound.
    """

    directory: Annotated[Path, Positional]
    """The checkpoint, of any format that llmq reads."""
    reference: str | None = None
    """Also print each layer's relative error to this model, usually the original, and the KL divergence from it."""
    text: str = "pytopics"
    """Text for the KL divergence: wikitext2, c4, pile (downloaded), pydoc, pytopics (offline), or a file."""
    sequence_length: int = 512
    """Tokens per chunk of that text."""
    limit: int = 4
    """Chunks of it."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""
    json: bool = False
    """Print one JSON object and nothing else on stdout."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or self.limit < 1:
            raise RequestError("sequence length must be at least 2 and limit at least 1")


def verify(config: VerifyConfig) -> dict[str, Any]:
    """What was found of a sound checkpoint. Raises CheckpointError if it is not sound."""
    checkpoint, digests = Checkpoint(config.directory), recorded(config.directory)
    check(config.directory, digests, config.trust_remote_code)
    found: dict[str, Any] = {
        "directory": str(config.directory),
        "packed_layers": len(checkpoint.linears),
        "other_tensors": len(checkpoint.other_names),
        "compared_with_report": digests is not None,
    }
    if config.reference is None:
        return found
    errors = relative_errors(checkpoint, config.reference, config.trust_remote_code)
    model = load(config.directory, "cpu", torch.float32, config.trust_remote_code)
    original, tokenizer = load_any(config.reference, "cpu", config.trust_remote_code)
    if original.config.vocab_size != model.config.vocab_size:
        raise RequestError(f"{config.reference} and {config.directory} have different vocabularies: no KL between them")
    text = read_text(config.text, evaluation=True)
    chunks = evaluation_chunks(tokenizer, text, config.sequence_length, config.limit)
    result = evaluate(model, chunks, logits_of(original))
    kl = result.kl if result.kl is not None and math.isfinite(result.kl) else None  # JSON knows no infinity
    return found | {"reference": config.reference, "text": config.text, "layer_errors": errors, "kl": kl}


def recorded(directory: Path) -> dict[str, str] | None:
    """The digests in a checkpoint's report; None if no tool of ours wrote it."""
    if not (directory / REPORT).exists():
        return None
    digests = read_json(directory, REPORT).get(DIGESTS)
    if digests is not None and not isinstance(digests, dict):
        raise CheckpointError(f"{directory / REPORT} is not a report of llmq: its {DIGESTS} are no names")
    return digests


def relative_errors(checkpoint: Checkpoint, reference: str, trust_remote_code: bool = False) -> dict[str, float]:
    """|W - W'| / |W| of every packed layer.

    Layers whose inputs a method rescaled (awq) differ by more than they err: the scale is undone elsewhere.
    """
    path = locate(reference, trust_remote_code)
    packed = Checkpoint(path) if is_packed(path) else None
    source = None if packed is not None else ModelSource(reference, trust_remote_code)
    errors: dict[str, float] = {}
    for name in checkpoint.linears:
        ours = checkpoint.weight(name).dequantize()
        if packed is not None:
            W = packed.weight(name).dequantize() if name in packed.schemes else packed.files.read(f"{name}.weight")
        else:
            assert source is not None
            W = source.read(f"{name}.weight")
        W = W.float()
        if W.shape != ours.shape:
            raise RequestError(f"{reference} is another model: its {name} is {tuple(W.shape)}, not {tuple(ours.shape)}")
        errors[name] = float((ours - W).norm() / W.norm().clamp(min=1e-30))
    return errors


def verify_command(config: VerifyConfig) -> None:
    """Verify and print."""
    found = verify(config)
    if config.json:
        print(json.dumps(found))
        return
    for name, error in found.get("layer_errors", {}).items():
        print(f"{name:<58} {error:9.2e}")
    compared = "are what was computed" if found["compared_with_report"] else "decode (no report says what was computed)"
    print(f"sound: {found['packed_layers']} packed layers and {found['other_tensors']} other tensors {compared};")
    print("the model runs on them and its logits are finite")
    if "kl" in found:
        kl = "not finite" if found["kl"] is None else f"{found['kl']:.5f} nats per token"
        print(f"KL to {found['reference']} on {found['text']}: {kl}")


def main() -> None:
    """Entry point; the flags are the fields of VerifyConfig."""
    run(VerifyConfig, verify_command)


if __name__ == "__main__":
    main()
