"""Makes a .gguf file of a packed checkpoint in a directory."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.gguf_writer import GgufSettings, GgufWriter, Written
from llmq.checkpoint.module_matching import check_fit
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import LlmqError
from llmq.formats.scheme import Scheme
from llmq.models.gguf_layout import sources_of
from llmq.models.model_source import build_skeleton
from llmq.models.untrusted_files import read_json
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.runtime.model_config import model_config
from llmq.verification.check import DIGESTS, check_and_digest

_DEMO = "SmolLM2-135M-Instruct"


@torch.no_grad()
def write_gguf(
    source: Path, target: Path, schemes: Mapping[str, Scheme], settings: GgufSettings
) -> tuple[Written, dict[str, Any]]:
    """Write the checkpoint in `source` as a .gguf file into `target`, and check it.

    Returns what was written, and what a report should say of it.

    `schemes`: of each packed linear, by its name in the files.

    Raises RequestError if the model cannot be written as GGUF, CheckpointError if the file is not what it should be.
    """
    checkpoint, trust = Checkpoint(source), settings.trust_remote_code
    model = build_skeleton(model_config(checkpoint, trust), trust)
    view = checkpoint.for_model(model)
    check_fit(model, view)
    sources = sources_of(model, {name: view.stored_linear(name) for name in view.linears})
    written = GgufWriter(checkpoint, schemes, sources, settings).write(target)
    return written, _read_again(written, trust)


def export(request: Request, run: Run, first: Path, target: Path) -> dict[str, Any]:
    """Write the checkpoint of a run, which is in the directory `first`, as a .gguf file into `target`.

    Returns the report of the run.
    """
    config, checkpoint = request.config, Checkpoint(first)
    name = model_name(first, config.model)
    settings = GgufSettings(name, trust_remote_code=config.trust_remote_code, progress=request.progress)
    _, said = write_gguf(first, target, checkpoint.schemes, settings)
    told = len(run.report.notes)
    run.report.note("model", said.pop("notes"))
    report = read_json(first, REPORT)  # after an interruption, it alone has the notes on the blocks
    report.pop(DIGESTS, None)
    return report | said | {"notes": report["notes"] + run.report.notes[told:]}


def _read_again(written: Written, trust_remote_code: bool) -> dict[str, Any]:
    """Run the model from the file, if transformers can read its architecture; return digests and notes."""
    few = ", ".join(written.in_float[:3]) + ", …" * (len(written.in_float) > 3)
    why = "llama.cpp's converter changes more than the order of rows and blocks"
    notes = [f"{len(written.in_float)} linears are in float, as {why}: {few}"] if written.in_float else []
    try:
        return {DIGESTS: check_and_digest(written.path, None, trust_remote_code)[1], "notes": notes}
    except LlmqError as error:
        reason = str(error).replace(str(written.path), written.path.name)  # which moves to another place
        notes.append(f"llmq wrote this file and compared its codes, but cannot load it: {reason}")
        return {"notes": notes}


def model_name(directory: Path, spec: str | None = None) -> str:
    """Return the name of a model for people. `spec`: what the user called it; else the report of its checkpoint tells.

    `org/name@revision`, a directory and a .gguf file are named by their last part, without a type such as Q4_0.
    """
    if spec is None:
        report = read_json(directory, REPORT) if (directory / REPORT).exists() else {}
        config = report.get("config")
        told = config.get("model") if isinstance(config, dict) else None
        spec = told if isinstance(told, str) and Path(told).name else str(directory.resolve())
    last = _DEMO if spec == "demo" else Path(spec).name or Path(spec).resolve().name
    name = re.sub(r"(\.(I?Q\d\w*|B?F16|F32))?(\.gguf)?$", "", last.partition("@")[0], flags=re.IGNORECASE)
    return re.sub(r"[^\w.+-]", "_", name) or "model"
