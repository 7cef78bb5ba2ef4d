"""Compare a packed checkpoint with the tensors that llmq computed, and with the original model."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.errors import CheckpointError, RequestError
from llmq.models.locate import locate
from llmq.models.model_source import ModelSource, build_skeleton
from llmq.models.stock_loading import unreadable
from llmq.models.untrusted_files import read_json
from llmq.runtime.evaluation import EvalConfig, evaluate_on_text
from llmq.runtime.model_config import model_config
from llmq.verification.check import DIGESTS, check
from llmq.verification.stated_share import SHARE, stated_share


@dataclass(frozen=True)
class VerifyConfig:
    """Decode every tensor, compare its digest with the one in llmq's report, and run the model.

    Exit code 0 means that the checkpoint is sound.
    """

    directory: Annotated[Path, Positional]
    """Directory of the checkpoint, in any format that llmq reads."""
    reference: str | None = None
    """Also print each layer's relative error to this model, usually the original, and the KL divergence from it."""
    text: str = "pytopics"
    """Text for the KL divergence: wikitext2, c4, pile (downloaded), pydoc, pytopics (offline), or a file."""
    sequence_length: int = 512
    """Tokens per chunk of that text."""
    limit: int = 4
    """Number of chunks of that text."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""
    json: bool = False
    """Print one JSON object and nothing else on stdout."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or self.limit < 1:
            raise RequestError("sequence length must be at least 2 and limit at least 1")


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check a checkpoint and return facts about it as a JSON object. Raises CheckpointError if it is not sound."""
    checkpoint, digests = Checkpoint(config.directory), recorded(config.directory)
    without_place = check(config.directory, digests, config.trust_remote_code)
    facts: dict[str, Any] = {
        "directory": str(config.directory),
        "packed_layers": len(checkpoint.linears),
        "other_tensors": len(checkpoint.other_names),
        "without_place": without_place,
        "compared_with_report": digests is not None,
        SHARE: stated_share(config.directory),
        "transformers": _in_transformers(checkpoint, config.trust_remote_code),
    }
    if config.reference is None:
        return facts
    errors = relative_errors(checkpoint, config.reference, config.trust_remote_code)
    options: dict[str, Any] = {"text": config.text, "sequence_length": config.sequence_length, "limit": config.limit}
    options |= {"reference": config.reference, "device": "cpu", "trust_remote_code": config.trust_remote_code}
    result, _ = evaluate_on_text(EvalConfig(str(config.directory), **options))
    kl = result.kl if result.kl is not None and math.isfinite(result.kl) else None  # JSON knows no infinity
    return facts | {"reference": config.reference, "text": config.text, "layer_errors": errors, "kl": kl}


def _in_transformers(checkpoint: Checkpoint, trust_remote_code: bool) -> str | None:
    """Return why stock transformers cannot open a checkpoint and may not say so; None if nothing is known of it."""
    if checkpoint.format.METHOD != "compressed-tensors":
        return None
    model = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
    view = checkpoint.for_model(model)
    return unreadable(model, view.model_files, {name: scheme.symmetric for name, scheme in view.schemes.items()}.get)


def recorded(directory: Path) -> dict[str, str] | None:
    """Return the digests in the report of a checkpoint, None if there are none: another tool wrote it."""
    if not (directory / REPORT).exists():
        return None
    digests = read_json(directory, REPORT).get(DIGESTS)
    if digests is not None and not isinstance(digests, dict):
        raise CheckpointError(f"{directory / REPORT} is not a report of llmq: its entry {DIGESTS} is no JSON object")
    return digests


def relative_errors(checkpoint: Checkpoint, reference: str, trust_remote_code: bool = False) -> dict[str, float]:
    """Return |W - W'| / |W| of every packed layer.

    If a method rescaled a layer's inputs (awq), this is larger than the real error: another layer undoes the scale.
    """
    path = locate(reference, trust_remote_code)
    packed = Checkpoint(path) if is_packed(path) else None
    source = None if packed is not None else ModelSource(reference, trust_remote_code)
    if packed is not None:
        model = build_skeleton(model_config(packed, trust_remote_code), trust_remote_code)
        packed, checkpoint = packed.for_model(model), checkpoint.for_model(model)
    if source is not None:
        checkpoint = checkpoint.for_model(source.skeleton)
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
