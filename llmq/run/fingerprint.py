"""What the bytes of a result depend on: two runs that agree in all of it end in the same checkpoint.

A resumed run is refused if anything here differs from the run that was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import Tokens
from llmq.core.config import VERSION, QuantizeConfig
from llmq.models.model_source import ModelSource
from llmq.run.report import versions

# Settings that say where and how, not what.
_WITHOUT_EFFECT = {"model", "output", "device", "overwrite", "resume", "dry_run", "offload_dir", "plot"}
_SAMPLES, _SAMPLE = 16, 1 << 16  # of every file of weights: so many stretches of so many bytes


def fingerprint(
    config: QuantizeConfig, source: ModelSource, tokens: Tokens, training: Tokens, compute: Compute
) -> dict[str, Any]:
    """JSON object. `training`: what the whole model is trained on in the end."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _WITHOUT_EFFECT}
    on_gpu = compute.device.type == "cuda"
    name = torch.cuda.get_device_name(compute.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "source": {path.name: _sampled(path) for path in (*source.files.paths, *_code(source))},
        "config": settings,
        "tokens": _hash(tokens.train, tokens.held_out, training.train),
        "versions": {"llmq": VERSION, **versions()},
        "compute": {"device": name, "dtype": str(compute.dtype), "products": str(compute.precision)},
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two fingerprints, as 'config.bits: 4, now 3'."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        found = (differences(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [each for part in found for each in part]
    # JSON knows no tuples.
    same = (
        list(before) == list(now)
        if isinstance(before, list | tuple) and isinstance(now, list | tuple)
        else before == now
    )
    return [] if same else [f"{name}: {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _code(source: ModelSource) -> list[Path]:
    """What says how the weights are used; in a GGUF file they say it themselves."""
    patterns = () if source.is_gguf else ("config.json", "*.py")
    return [path for pattern in patterns for path in sorted(source.directory.glob(pattern))]


def _sampled(path: Path) -> str:
    """Size, and a hash of stretches all over the file: reading all of a large model would take minutes."""
    hashed, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1), os.SEEK_SET)
            hashed.update(file.read(_SAMPLE))
    return f"{size} bytes, {hashed.hexdigest()}"


def _hash(*tensors: Tensor) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(f"{list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().numpy().data)
    return hashed.hexdigest()
