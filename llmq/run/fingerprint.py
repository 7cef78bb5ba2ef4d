"""What the bytes of a result depend on. Two runs with the same fingerprint end in the same checkpoint.

A run is not resumed if its fingerprint differs from that of the interrupted run.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import Tokens
from llmq.core.config import VERSION, QuantizeConfig
from llmq.models.model_source import ModelSource
from llmq.run.report import versions

# Settings without influence on the bytes of the result.
_WITHOUT_EFFECT = {"model", "revision", "output", "device", "overwrite", "resume", "dry_run", "offload_dir", "plot"}
# Stretches of each file of weights that are hashed, and the bytes of one.
_STRETCHES, _STRETCH = 16, 1 << 16


def fingerprint(
    config: QuantizeConfig, source: ModelSource, tokens: Tokens, training: Tokens, compute: Compute
) -> dict[str, Any]:
    """Return the fingerprint, a JSON object. `training`: the text that the whole model is trained on in the end."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _WITHOUT_EFFECT}
    on_gpu = compute.device.type == "cuda"
    name = torch.cuda.get_device_name(compute.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "source": {path.name: hash_of_file(path) for path in (*source.files.paths, *_code(source))},
        "config": settings,
        "tokens": hash_of_tensors(tokens.train, tokens.held_out, training.train),
        "versions": {"llmq": VERSION, **versions()},
        "compute": {"device": name, "dtype": str(compute.dtype), "products": str(compute.precision)},
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what differs between two fingerprints, in lines such as 'config.bits: 4, now 3'.

    `name`: of the entry that is compared; empty for the whole.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        inner = (differences(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [*chain.from_iterable(inner)]
    # JSON has no tuples: one that was written comes back as a list.
    stored = [list(value) if isinstance(value, tuple) else value for value in (before, now)]
    return [] if stored[0] == stored[1] else [f"{name}: {_short(before)}, now {_short(now)}"]


def told_differences(output: Path, differing: list[str]) -> str:
    """Return an error for a run in `output` that cannot be resumed, because its settings were other ones."""
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"{output} holds a run with other settings, which this one cannot resume: {differing[0]}{more}.\n"
        "Give the settings of that run, or replace it with --overwrite."
    )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _code(source: ModelSource) -> list[Path]:
    """Return the files that say how the weights are used. A GGUF file says so itself."""
    patterns = () if source.is_gguf else ("config.json", "*.py")
    return [path for pattern in patterns for path in sorted(source.directory.glob(pattern))]


def hash_of_file(path: Path) -> str:
    """Return the size of a file and a hash of stretches all over it: to read a whole large model would take minutes."""
    hashed, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for i in range(_STRETCHES):
            file.seek(max(0, size - _STRETCH) * i // (_STRETCHES - 1), os.SEEK_SET)
            hashed.update(file.read(_STRETCH))
    return f"{size} bytes, {hashed.hexdigest()}"


def hash_of_tensors(*tensors: Tensor) -> str:
    """Return one hash of the shapes and values of all these tensors."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(f"{list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().numpy().data)
    return hashed.hexdigest()
