"""The road of llmq.train: open the request, quantize an original model, train, write what was learned.

All that an interrupted training needs lies in the unfinished output directory: the quantized start, and the checkpoints
of the training.
"""

import sys
import time
from collections.abc import Generator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.model_files import companions_in
from llmq.checkpoint.output_dir import unfinished_work, write_json
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer
from llmq.core.config import QuantizeConfig
from llmq.core.device import full_float32, pick_device
from llmq.core.distributed import local_rank
from llmq.core.errors import WorkError
from llmq.core.memory import PeakMemory, release_memory
from llmq.core.train_config import TrainConfig
from llmq.formats.compressed_tensors import with_rounded_inputs
from llmq.models.model_source import ModelSource
from llmq.pipeline import quantize
from llmq.qat.layers import chosen_layers, start_report
from llmq.qat.plan import lines
from llmq.qat.report import shown, trained
from llmq.qat.request import FINGERPRINT, SETTINGS, TrainRequest, open_request
from llmq.qat.trainer import Outcome, train_student
from llmq.run.student import Learning, Student
from llmq.verification.check import DIGESTS, check


def train(config: TrainConfig, progress: bool = False) -> Path:
    """Train a model while its weights are quantized, and write a packed checkpoint; returns its directory.

    If a launcher (torchrun) started several processes, each trains on its share of every batch; the first one writes.

    `progress`: show a progress bar and a summary on stderr.

    Raises RequestError before any work if the request is wrong, WorkError if the work fails. In both cases nothing in
    the output directory looks like a finished checkpoint. `resume` goes on from the last check.
    """
    device = pick_device(config.device, local_rank())
    with full_float32():
        request = open_request(config, device)
        if config.dry_run:
            print(*lines(request), sep="\n")
        elif request.is_met:
            print(f"{config.output} holds the finished checkpoint already", file=sys.stderr)
        else:
            _work(request, progress and request.is_first)
    return config.output


def _work(request: TrainRequest, progress: bool) -> None:
    config, began, memory = request.config, time.monotonic(), PeakMemory()
    writer = Writer(config.output, config.overwrite, config.resume) if request.is_first else None
    with writer or nullcontext():
        if writer is not None:
            write_json(writer.work / SETTINGS, request.fingerprint)
            writer.resumable = True  # what was quantized and trained need not be done again
        start = request.packed or _quantized(request, progress)
        outcome = _trained(request, start, progress)
        if writer is None:
            return
        seconds = time.monotonic() - began
        report = trained(request, outcome, start, seconds, memory.largest)
        _write(writer, start, outcome.changed, report | {FINGERPRINT: request.fingerprint}, config)
        if progress:
            print(shown(report, config.output), file=sys.stderr)


def _quantized(request: TrainRequest, progress: bool) -> Path:
    """Quantize the original model into the workroom, unless that was done before the training was interrupted."""
    config = request.config
    start = unfinished_work(config.output) / "start"
    return quantize(
        QuantizeConfig(
            config.source,
            start,
            method=config.start,
            bits=config.bits,
            group_size=config.group_size,
            format=config.format,
            calibration=config.calibration or config.data[0],
            samples=config.calibration_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            device=config.device,
            resume=start.is_dir(),
            trust_remote_code=config.trust_remote_code,
        ),
        progress,
    )


def _trained(request: TrainRequest, start: Path, progress: bool) -> Outcome:
    """Train the checkpoint in `start`. Raises WorkError if a GPU has too little memory."""
    config, compute = request.config, request.compute
    learning = Learning(
        codes=config.learn != "scales",
        outside=config.learn == "all",
        layers=chosen_layers(config.train_layers, request.sizes, start_report(start)).__contains__,
        activations=config.activations == 8,
    )
    try:
        original = None
        if request.original and (config.needs_original or learning.codes):
            source = ModelSource(request.original, config.trust_remote_code)
            original = source.load_all(compute.device, compute.dtype).requires_grad_(False)
        student = Student(start, original, compute, config.trust_remote_code, learning)
        if not config.needs_original:
            original = None  # it only said where the codes begin
            release_memory()
        directory = unfinished_work(config.output) / "training"
        return train_student(student, original, request.data, config, directory, progress)
    except torch.OutOfMemoryError:
        way = "use --micro-batch 1, --checkpointing, a shorter --sequence-length, or --learn scales"
        raise WorkError(f"the training does not fit into the GPU's memory.\n{way}") from None


def _write(
    writer: Writer, start: Path, changed: dict[str, Tensor], report: dict[str, Any], config: TrainConfig
) -> None:
    """Write the checkpoint in `start` again, with changed tensors in place of the old ones; check and publish it."""
    checkpoint = Checkpoint(start)
    digests, quantization = digests_of(checkpoint, changed), checkpoint.quantization
    if config.activations == 8:
        quantization = with_rounded_inputs(quantization)
    for tensors in _by_module(checkpoint, changed):
        writer.put(tensors)
    writer.finish(
        companions_in(start),
        quantization_config=quantization,
        report=lambda: report | {DIGESTS: digests},
        check=lambda directory: check(directory, digests, config.trust_remote_code),
    )


def _by_module(checkpoint: Checkpoint, changed: dict[str, Tensor]) -> Generator[dict[str, Tensor]]:
    """Yield all tensors of a checkpoint, module by module, changed ones in place of the old ones."""
    files = checkpoint.files
    for _, names in groupby(sorted(files.names()), key=lambda name: name.rpartition(".")[0]):
        yield {name: changed[name] if name in changed else files.read(name) for name in names}
