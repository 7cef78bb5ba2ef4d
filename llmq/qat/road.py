"""The road of llmq.train: open the request, quantize an original model, train, write what was learned.

All that an interrupted training needs lies in the unfinished output directory: the quantized start, and the checkpoints
of the training.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.model_files import Companions, companions_in
from llmq.checkpoint.output_dir import remove_leftovers, unfinished_work, write_json
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer, by_module
from llmq.core.device import full_float32, pick_device
from llmq.core.distributed import joined_ranks, local_rank
from llmq.core.errors import RequestError, WorkError
from llmq.core.memory import PeakMemory, release_memory
from llmq.core.train_config import TrainConfig
from llmq.formats import mlx
from llmq.formats.compressed_tensors import with_rounded_inputs
from llmq.models.model_source import ModelSource
from llmq.models.untrusted_files import read_json
from llmq.pipeline import quantize
from llmq.qat.adapters import AdapterStudent, merging, with_adapter, write_dense
from llmq.qat.layers import chosen_layers, start_report
from llmq.qat.outcome import Outcome
from llmq.qat.plan import lines
from llmq.qat.report import shown, trained
from llmq.qat.request import FINGERPRINT, SETTINGS, START, TrainRequest, open_request, start_request
from llmq.qat.trainer import held_out_loss, train_student
from llmq.run.prepare import compute_for
from llmq.run.student import Learning, Student
from llmq.runtime.load import load
from llmq.runtime.rounded_inputs import round_inputs
from llmq.verification.check import DIGESTS, check

_SEQUENCES = 8  # of the data, on which scales for inputs are found
_RANGES = "input_ranges.json"  # in the workroom


def train(config: TrainConfig, progress: bool = False) -> Path:
    """Train a model while its weights are quantized, and write a packed checkpoint; returns its directory.

    If a launcher (torchrun) started several processes, each trains on its share of every batch; the first one writes.

    `progress`: show a progress bar and a summary on stderr.

    Raises RequestError before any work if the request is wrong, WorkError if the work fails. In both cases nothing in
    the output directory looks like a finished checkpoint. `resume` goes on from the last check.
    """
    device = pick_device(config.device, local_rank())
    with joined_ranks(device), full_float32():
        request = open_request(config, device)
        if config.dry_run:
            print(*(lines(request) if request.is_first else ()), sep="\n")
        elif request.is_met:
            if request.is_first:
                remove_leftovers(config.output)
            print(f"{config.output} holds the finished checkpoint already", file=sys.stderr)
        else:
            _work(request, progress and request.is_first)
    return config.output


def _work(request: TrainRequest, progress: bool) -> None:
    config = request.config
    writer = Writer(config.output, config.overwrite, config.resume) if request.is_first else None
    with writer or nullcontext():
        with joined_ranks(request.compute.device) as ranks:
            is_checked = ranks.first(lambda: writer is not None and writer.is_checked)
        if is_checked:  # an earlier process did all but move the checkpoint to its place
            if writer is not None:
                writer.publish()
            return
        if writer is not None:
            write_json(writer.work / SETTINGS, request.fingerprint)
        start = request.packed or _quantized(request, writer, progress)
        student, original = _student(request, start)
        if progress and request.data.left_out:
            print(f"note: {request.data.left_out}", file=sys.stderr)
        if writer is not None:
            writer.resumable = True  # what was trained need not be trained again
        _train_into(request, writer, start, (student, original), progress)


def _train_into(
    request: TrainRequest,
    writer: Writer | None,
    start: Path,
    models: tuple[Student | AdapterStudent, Any],
    progress: bool,
) -> None:
    """Train, and write the result into the directory of a writer, in the process that has one."""
    config, memory, (student, original) = request.config, PeakMemory(), models
    scales = student.input_scales() if isinstance(student, Student) else {}
    outcome = _trained(request, student, original, progress)
    release_memory()
    if writer is None:
        return
    result, companions, merged = start, companions_in(start), None
    if isinstance(student, AdapterStudent) and outcome.changed:
        student.take(outcome.changed)
        companions = with_adapter(companions, student)
        with _in_memory(), request.clock("merge"):
            candidate, merged = _merged(request, student, original, progress)
        result = candidate if merged < outcome.before else start
    report = trained(request, outcome, merged, result)
    report |= {"seconds": {"total": request.clock.total, **request.clock.seconds}, "peak_memory_bytes": memory.largest}
    report |= {FINGERPRINT: request.fingerprint}
    _write(writer, result, companions, {} if config.lora else outcome.changed or scales, report, request)
    if progress:
        print(shown(report, config.output), file=sys.stderr)


def _quantized(request: TrainRequest, writer: Writer | None, progress: bool) -> Path:
    """Quantize the original model into the workroom, unless that was done before the training was interrupted."""
    start = unfinished_work(request.config.output) / START
    if writer is not None:
        writer.resumable = True  # what was quantized need not be quantized again
    try:
        with request.clock("start"):
            quantize(replace(start_request(request.config), resume=start.is_dir()), progress)
    except RequestError:
        if writer is not None:
            writer.resumable = request.config.resume
        raise
    with joined_ranks(request.compute.device) as ranks:
        ranks.meet()  # the first process publishes the checkpoint after the others have done their work
    return start


def _student(request: TrainRequest, start: Path) -> tuple[Student | AdapterStudent, Any]:
    """Return the checkpoint in `start` as a model that learns, and the original model if the loss needs it."""
    config, compute = request.config, request.compute
    layers = chosen_layers(config.train_layers, request.sizes, start_report(start))
    learning = Learning(config.learn != "scales", config.learn == "all", layers.__contains__, config.inputs)
    with _in_memory():
        original = None
        if request.original and (config.needs_original or learning.codes):
            source = ModelSource(request.original, config.trust_remote_code)
            dtype = compute_for(source, compute.device, trains=False).dtype
            original = source.load_all(compute.device, dtype).requires_grad_(False)
        if config.lora:
            student = AdapterStudent(start, config, compute, layers)
        else:
            student = Student(start, original, compute, config.trust_remote_code, learning)
            with joined_ranks(compute.device) as ranks:
                student.add_ranges(ranks.first(lambda: _ranges(request, student)))
    if not config.needs_original:
        original = None  # it only said where the codes begin
        release_memory()
    return student, original


def _ranges(request: TrainRequest, student: Student) -> list[tuple[list[str], float]]:
    """Return which linears share a scale for their inputs, and where it begins: as an interrupted request found it."""
    file = unfinished_work(request.config.output) / _RANGES
    if not file.exists():
        some = [each.ids[None].to(request.compute.device) for each in request.data.train[:_SEQUENCES]]
        write_json(file, {"ranges": student.best_ranges(some)})
    return [(names, scale) for names, scale in read_json(file.parent, file.name)["ranges"]]


def _trained(request: TrainRequest, student: Student | AdapterStudent, original: Any, progress: bool) -> Outcome:
    """Return what the training brings, or brought before the request was interrupted."""
    work = unfinished_work(request.config.output)
    outcome = Outcome.load(work)
    if outcome is None:
        with _in_memory(), request.clock("training"):
            outcome = train_student(student, original, request.data, request.config, work / "training", progress)
        if request.is_first:
            outcome.save(work)
    return outcome


@contextmanager
def _in_memory() -> Generator[None]:
    """Raise WorkError where a GPU has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        way = "use --micro-batch 1, --checkpointing, a shorter --sequence-length, or --learn scales"
        raise WorkError(f"the training does not fit into the GPU's memory.\n{way}") from None


def _merged(request: TrainRequest, student: AdapterStudent, original: Any, progress: bool) -> tuple[Path, float]:
    """Quantize the sum of weights and adapters; return the checkpoint and its loss on held-out sequences."""
    config, work = request.config, unfinished_work(request.config.output)
    write_dense(student, work / "dense", config)
    merged = quantize(merging(config, student.start, work / "dense", work / "merged"), progress)
    model = load(merged, str(request.compute.device), torch.float32, config.trust_remote_code)
    if _with_adapters(config, student.start):
        round_inputs(model)
    return merged, held_out_loss(model, original, request.data, config, request.compute)


def _with_adapters(config: TrainConfig, start: Path) -> str:
    """Return how a checkpoint with merged adapters rounds its inputs: as it is asked for, or as its start does."""
    return config.inputs or max(scheme.rounded_inputs for scheme in Checkpoint(start).schemes.values())


def _write(
    writer: Writer,
    result: Path,
    companions: Companions,
    changed: dict[str, Tensor],
    report: dict[str, Any],
    request: TrainRequest,
) -> None:
    """Write the checkpoint in `result` again, with changed tensors in place of the old ones; check and publish it."""
    checkpoint, config = Checkpoint(result), request.config
    quantization = checkpoint.quantization
    if (
        checkpoint.format.METHOD == mlx.METHOD
    ):  # the settings of mlx_lm may name what is not packed any more, such as embeddings
        quantization = mlx.hf_config(checkpoint.schemes, [])
    how = config.inputs if request.packed is None or not config.lora else _with_adapters(config, request.packed)
    if how:
        quantization = with_rounded_inputs(quantization, how)
        schemes = checkpoint.schemes.items()
        checkpoint.schemes = {name: replace(s, rounded_inputs=s.rounded_inputs or how) for name, s in schemes}
    digests = digests_of(checkpoint, changed)
    for tensors in by_module(checkpoint.files, changed):
        writer.put(tensors)
    writer.finish(
        companions,
        quantization_config=quantization,
        report=lambda: report | {DIGESTS: digests},
        check=lambda directory: check(directory, digests, config.trust_remote_code),
    )
