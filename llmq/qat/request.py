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
from llmq.checkpoint.output_dir import PROGRESS, REPORT, UNFINISHED, check_output, holds_checkpoint, unfinished_work
from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.config import VERSION, QuantizeConfig
from llmq.core.device import product_dtype
from llmq.core.distributed import processes
from llmq.core.errors import RequestError
from llmq.core.timing import Clock
from llmq.core.train_config import WORST, TrainConfig
from llmq.models.locate import gguf_in, locate
from llmq.models.model_source import ModelSource, build_skeleton
from llmq.models.stored_names import tied_names
from llmq.models.untrusted_files import read_json
from llmq.qat.adapters import merging
from llmq.qat.checks import check_original, check_original_start, check_packed, check_text_is_enough, check_useful
from llmq.qat.data import Data, data_of
from llmq.qat.layers import chosen_layers, start_report
from llmq.run.fingerprint import differences, hash_of_file, hash_of_tensors, told_differences
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
    clock: Clock

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each packed linear."""
        return {name: self.skeleton.get_submodule(name).weight.numel() for name in self.packed_names}

    @property
    def outside(self) -> int:
        """Return the number of all other weights. Embeddings that also predict the words count once."""
        aliases = tied_names(self.skeleton).keys()
        whole = sum(p.numel() for name, p in self.skeleton.named_parameters() if name not in aliases)
        return whole - sum(self.sizes.values())

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes."""
        return is_first()


def is_first() -> bool:
    """Return whether this is the process that writes, as the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def open_request(config: TrainConfig, device: torch.device) -> TrainRequest:
    """Open the model and the data. Raises RequestError if the request cannot be met."""
    clock = Clock()
    if not config.dry_run and is_first():
        check_output(config.output, config.overwrite, config.resume)
    _check_processes(config, device)
    path, trust = locate(config.source, config.trust_remote_code), config.trust_remote_code
    packed = path if is_packed(path) else None
    check_useful(config, packed is not None)
    if packed is None:
        source = ModelSource(config.source, trust)
        check_original_start(config, source, start_request(config))
        original, tokenizer, skeleton, files = config.source, source.tokenizer, source.skeleton, source.files.paths
        blocks = [(name, skeleton.get_submodule(name)) for name in source.block_names]
        names = [f"{b}.{name}" for b, block in blocks for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    else:
        skeleton, files, names = _opened(config, packed)
        original, tokenizer = config.original, open_tokenizer(packed, trust)
        if original:
            source = ModelSource(original, trust)
            check_original(source, skeleton, names)
            files = [*files, *source.files.paths]
            path = source.directory
        if config.lora:
            check_text_is_enough(merging(config, packed, config.output / "dense", config.output / "merged"), tokenizer)
    if config.output.resolve() in (path.resolve(), None if packed is None else packed.resolve()):
        raise RequestError("the output directory is the model's own; choose another")
    if config.needs_original and not original:
        raise RequestError(f"loss {config.loss} follows the original model: name it with --original")
    if config.checkpointing and not getattr(skeleton, "supports_gradient_checkpointing", False):
        raise RequestError(f"{type(skeleton).__name__} cannot train with --checkpointing; leave it out")
    check_context(skeleton.config, config.sequence_length)
    data = data_of(config, tokenizer, skeleton)
    compute = Compute(device, torch.float32, product_dtype(device))
    identity = {
        "source": {f"{i}: {file.name}": hash_of_file(file) for i, file in enumerate(files)},
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in _WITHOUT_EFFECT},
        "data": hash_of_tensors(*(x for e in (*data.train, *data.held_out) for x in (e.ids, e.labels))),
        "versions": {"llmq": VERSION, **versions()},
        "compute": {"device": device.type, "products": str(compute.precision), "processes": processes()},
    }
    is_met = config.resume and _is_met(config.output, identity)
    request = TrainRequest(config, compute, packed, original, skeleton, names, data, identity, is_met, clock)
    if packed is not None or WORST.fullmatch(config.train_layers) is None:
        chosen_layers(config.train_layers, request.sizes, {} if packed is None else start_report(packed))
    return request


def _check_processes(config: TrainConfig, device: torch.device) -> None:
    """Raise RequestError for what transformers' Trainer cannot do with these processes and this device."""
    if config.lora and processes() > 1:
        raise RequestError("lora merges its adapters in one process; start it without a launcher")
    if processes() == 1 and device.type == "cuda" and device.index not in (None, 0):
        index = device.index
        raise RequestError(f"training takes the first GPU; for device {device}: CUDA_VISIBLE_DEVICES={index} … cuda:0")


def start_request(config: TrainConfig) -> QuantizeConfig:
    """Return the request that quantizes an original model before its training. Raises RequestError if it is wrong."""
    return config.quantizing(
        config.source,
        unfinished_work(config.output) / START,
        method=config.start,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        format=config.format,
    )


def _opened(config: TrainConfig, packed: Path) -> tuple[Any, list[Path], list[str]]:
    """Return the skeleton of a packed checkpoint, its files of weights, and the names of its packed linears.

    Raises RequestError if it cannot learn.
    """
    if gguf_in(packed) is not None:
        raise RequestError("a .gguf file cannot be trained; train a directory, and then use llmq.convert")
    checkpoint = Checkpoint(packed)
    skeleton = build_skeleton(model_config(checkpoint, config.trust_remote_code), config.trust_remote_code)
    check_packed(config, checkpoint, skeleton)
    return skeleton, sorted(packed.glob("*.safetensors")), checkpoint.for_model(skeleton).linears


def _is_met(output: Path, identity: dict[str, Any]) -> bool:
    """Return whether the finished checkpoint is there. Raises RequestError if it, or the work on it, is another's."""
    work = unfinished_work(output)
    is_finished = not (output / UNFINISHED).exists() and holds_checkpoint(output) and (output / REPORT).exists()
    if is_finished:
        before = read_json(output, REPORT).get(FINGERPRINT)
    elif (work / SETTINGS).exists():
        before = read_json(work, SETTINGS)
    elif work.exists() and any(work.iterdir()):
        before = None
    else:
        return False
    if not before or (work / PROGRESS).exists():
        raise RequestError(f"{output} holds the work of another program, not a training; --overwrite replaces it")
    if differing := differences(before, identity):
        raise RequestError(told_differences(output, differing))
    return is_finished
