"""Checks a request to train, and opens what it needs."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import check_context
from llmq.checkpoint.output_dir import REPORT, check_output, holds_checkpoint, unfinished_work
from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.config import VERSION, QuantizeConfig
from llmq.core.device import multiplies_bfloat16
from llmq.core.errors import RequestError
from llmq.core.train_config import WORST, TrainConfig
from llmq.formats import CONVERTED, ROUNDING
from llmq.models.locate import gguf_in, locate
from llmq.models.model_source import ModelSource, build_skeleton
from llmq.models.untrusted_files import read_json
from llmq.qat.data import Data, data_of
from llmq.qat.layers import chosen_layers, start_report
from llmq.run.fingerprint import differences, hash_of_file, hash_of_tensors
from llmq.run.report import versions
from llmq.runtime.load import open_tokenizer
from llmq.runtime.model_config import model_config

FINGERPRINT = "fingerprint"  # key of the report
START = "start"  # the directory of the quantized start, in the workroom
SETTINGS = "training.json"  # the fingerprint of an unfinished training, in the workroom
_WITHOUT_EFFECT = {"model", "revision", "original", "output", "device", "overwrite", "resume", "dry_run"}


@dataclass(frozen=True)
class TrainRequest:
    """A checked request to train."""

    config: TrainConfig
    compute: Compute
    packed: Path | None  # the checkpoint to start from; None: the model is an original
    original: str  # the model without quantization, as `ModelSource` takes it; empty if it is not known
    skeleton: Any  # the model on the meta device
    packed_names: list[str]  # of the linears that are packed, or will be
    data: Data
    fingerprint: dict[str, Any]
    is_met: bool  # whether the finished checkpoint is there already

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each packed linear."""
        return {name: self.skeleton.get_submodule(name).weight.numel() for name in self.packed_names}

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes."""
        return os.environ.get("RANK", "0") == "0"


def open_request(config: TrainConfig, device: torch.device) -> TrainRequest:
    """Open the model and the data. Raises RequestError if the request cannot be met."""
    if not config.dry_run and os.environ.get("RANK", "0") == "0":
        check_output(config.output, config.overwrite, config.resume)
    if config.lora and os.environ.get("WORLD_SIZE", "1") != "1":
        raise RequestError("lora merges its adapters in one process; start it without a launcher")
    path, trust = locate(config.source, config.trust_remote_code), config.trust_remote_code
    packed = path if is_packed(path) else None
    if path.resolve() == config.output.resolve():
        raise RequestError("the output directory is the model's own; choose another")
    if packed is None:
        start_request(config)
        source = ModelSource(config.source, trust)
        original, tokenizer, skeleton, files = config.source, source.tokenizer, source.skeleton, source.files.paths
        blocks = [(name, skeleton.get_submodule(name)) for name in source.block_names]
        names = [f"{b}.{name}" for b, block in blocks for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        if config.activations == 8 and config.format not in ("auto", *ROUNDING):
            raise RequestError(f"{config.format} {_ACTIVATIONS}")
        if config.original:
            raise RequestError("original is for packed checkpoints, and this model is an original; leave it out")
    else:
        skeleton, files, names = _opened(config, packed)
        original, tokenizer = config.original, open_tokenizer(packed, trust)
    if config.needs_original and not original:
        raise RequestError(f"loss {config.loss} follows the original model: name it with --original")
    check_context(skeleton.config, config.sequence_length)
    data = data_of(config, tokenizer, skeleton)
    compute = Compute(device, torch.float32, torch.bfloat16 if multiplies_bfloat16(device) else torch.float32)
    identity = {
        "source": {file.name: hash_of_file(file) for file in files},
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in _WITHOUT_EFFECT},
        "data": hash_of_tensors(*(x for e in (*data.train, *data.held_out) for x in (e.ids, e.labels))),
        "versions": {"llmq": VERSION, **versions()},
        "compute": {"device": device.type, "products": str(compute.precision)},
    }
    is_met = config.resume and _is_met(config.output, identity)
    request = TrainRequest(config, compute, packed, original, skeleton, names, data, identity, is_met)
    if packed is not None or WORST.fullmatch(config.train_layers) is None:
        chosen_layers(config.train_layers, request.sizes, {} if packed is None else start_report(packed))
    return request


def start_request(config: TrainConfig) -> QuantizeConfig:
    """Return the request that quantizes an original model before its training. Raises RequestError if it is wrong."""
    return QuantizeConfig(
        config.source,
        unfinished_work(config.output) / START,
        method=config.start,
        bits=config.bits,
        group_size=config.group_size,
        format=config.format,
        calibration=config.calibration or config.data[0],
        samples=config.calibration_samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _opened(config: TrainConfig, packed: Path) -> tuple[Any, list[Path], list[str]]:
    """Return the skeleton of a packed checkpoint, its files of weights, and the names of its packed linears.

    Raises RequestError if it cannot learn.
    """
    if gguf_in(packed) is not None:
        raise RequestError("a .gguf file cannot be trained; train a directory, and then use llmq.convert")
    checkpoint, ignored = Checkpoint(packed), [f.name for f in dataclasses.fields(config) if f.name in _OF_ORIGINALS]
    given = [name for name in ignored if getattr(config, name) != getattr(TrainConfig, name)]
    if given:
        raise RequestError(f"{given[0].replace('_', ' ')} is for original models; a packed checkpoint has its own")
    if checkpoint.format not in CONVERTED.values():
        raise RequestError(f"checkpoints of {checkpoint.format.METHOD} cannot be written; use llmq.convert before")
    if config.activations == 8 and checkpoint.format.METHOD not in ROUNDING:
        raise RequestError(f"{checkpoint.format.METHOD} {_ACTIVATIONS}")
    if any(scheme.act_order for scheme in checkpoint.schemes.values()):
        raise RequestError("groups that are spread over the row (desc_act) cannot be trained; quantize without them")
    skeleton = build_skeleton(model_config(checkpoint, config.trust_remote_code), config.trust_remote_code)
    return skeleton, sorted(packed.glob("*.safetensors")), checkpoint.for_model(skeleton).linears


_ACTIVATIONS = "cannot say that inputs are rounded to 8 bits; use compressed-tensors, or leave out --activations"
_OF_ORIGINALS = ("bits", "group_size", "start", "format")


def _is_met(output: Path, identity: dict[str, Any]) -> bool:
    """Return whether the finished checkpoint is there. Raises RequestError if it, or the work on it, is another's."""
    work = unfinished_work(output) / SETTINGS
    is_finished = not work.exists() and holds_checkpoint(output) and (output / REPORT).exists()
    if not work.exists() and not is_finished:
        return False
    before = read_json(output, REPORT).get(FINGERPRINT) if is_finished else read_json(work.parent, SETTINGS)
    if differing := differences(before or {}, identity):
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise RequestError(
            f"{output} holds a training with other settings, which this one cannot resume: {differing[0]}{more}.\n"
            "Give the settings of that training, or replace it with --overwrite."
        )
    return is_finished
