"""Compare fine-tuning with and without quantization on a small task: the loss of answers that the model must write.

The task is made from Python's own library: the model is told what a function does, and answers with its name, module
and arguments in a fixed form. Four models answer the same questions, none of which was trained on:

    original                 as it is
    fine-tuned               in float, --steps steps
    fine-tuned, then gptq    the same model, quantized afterwards
    QAT                      quantized, then trained by llmq.train for as many steps

    python scripts/compare_finetuning.py --model demo --bits 4 --steps 200
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

import llmq
from llmq.calibration.answers import examples
from llmq.calibration.block_runner import Compute
from llmq.cli import run
from llmq.core.device import multiplies_bfloat16
from llmq.core.errors import WorkError
from llmq.core.train_config import TrainConfig
from llmq.models.model_source import ModelSource
from llmq.qat.data import Data, collated, data_of
from llmq.qat.losses import Learner
from llmq.qat.trainer import Sequences, held_out_loss, optimizer_of

_QUESTION = "Which function of Python's library does this?\n\n{}"
_TEST_EVERY = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a model on a task in float and while quantized, and compare the losses of its answers."""

    model: str = "demo"
    """Directory, hub id, .gguf file, or demo for the demo model. It needs a chat template."""
    bits: tuple[int, ...] = (4,)
    """Bits per weight."""
    group_size: int = 64
    """Weights that share a scale."""
    steps: int = 200
    """Training steps, of --batch questions each."""
    batch: int = 8
    """Questions per step."""
    rate: float = 5e-5
    """Learning rate in float."""
    flags: str = "--learn all --rate 0.001 --scale-rate 0.001 --outside-rate 5e-5"
    """How llmq.train learns."""
    sequence_length: int = 512
    """The most tokens of a question with its answer."""
    questions: int = 2000
    """Questions to train on, at most."""
    keep: Path | None = None
    """Directory for the questions and all models; without it, they are removed."""


def compare(config: FinetuneConfig) -> None:
    """Train and measure all models, then print the table in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        room = config.keep or Path(name)
        room.mkdir(parents=True, exist_ok=True)
        train, test = write_questions(room, config.questions)
        print("| model | loss of answers | seconds |\n|---|---|---|")
        for title, loss, seconds in rows(config, room, train, test):
            print(f"| {title} | {loss:.4f} | {seconds:.0f} |", flush=True)


def rows(config: FinetuneConfig, room: Path, train: Path, test: Path) -> Iterator[tuple[str, float, float]]:
    """Yield the title, the loss and the seconds of each model."""
    settings = TrainConfig(
        config.model,
        room,
        (str(train),),
        steps=config.steps,
        batch=config.batch,
        micro_batch=config.batch,
        sequence_length=config.sequence_length,
    )
    compute = Compute(CPU, torch.float32, torch.bfloat16 if multiplies_bfloat16(CPU) else torch.float32)
    source = ModelSource(config.model)
    held_out = Data([], examples(test, source.tokenizer, settings.sequence_length)[0], [])

    def loss(model: Any) -> float:
        return held_out_loss(model, None, held_out, settings, compute)

    yield "original", loss(source.load_all(CPU, torch.float32)), 0.0
    model, seconds = fine_tuned(config, settings, compute, room / "float")
    yield "fine-tuned", loss(model), seconds
    del model
    common = ["--group-size", str(config.group_size), "--calibration", str(train)]
    common += ["--sequence-length", str(config.sequence_length)]
    for bits in config.bits:
        own = [*common, "--bits", str(bits)]
        seconds = _run("quantize", room / "float", room / f"gptq-{bits}", [*own, "--samples", "64"])
        yield f"fine-tuned, then gptq at {bits} bit", loss(llmq.load(room / f"gptq-{bits}", "cpu")), seconds
        own += ["--data", str(train), "--steps", str(config.steps)]
        own += ["--batch", str(config.batch), "--micro-batch", str(config.batch)]
        own += config.flags.split()
        seconds = _run("train", config.model, room / f"qat-{bits}", own)
        yield f"QAT at {bits} bit", loss(llmq.load(room / f"qat-{bits}", "cpu")), seconds


def fine_tuned(config: FinetuneConfig, settings: TrainConfig, compute: Compute, output: Path) -> tuple[Any, float]:
    """Return the model after its last step in float, with the optimizer of llmq.train, and the seconds."""
    source = ModelSource(config.model)
    model: Any = source.load_all(CPU, torch.float32).requires_grad_(True)
    learning = dict(model.named_parameters())
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=compute.precision == torch.bfloat16,
    )
    optimizers = optimizer_of([{"params": list(learning.values()), "lr": config.rate}], config.steps)
    found = data_of(settings, source.tokenizer, model).train
    learner = Learner(model, learning, None, "text")
    trainer = Trainer(learner, arguments, collated, Sequences(found), optimizers=optimizers)
    trainer.remove_callback(PrinterCallback)  # stdout holds the table
    with torch.enable_grad():
        seconds = trainer.train().metrics["train_runtime"]
    model.save_pretrained(output)
    source.tokenizer.save_pretrained(output)
    return model, seconds


def _run(program: str, model: Path | str, output: Path, flags: list[str]) -> float:
    """Run a program of llmq; return its seconds."""
    command = [sys.executable, "-m", f"llmq.{program}", "--model", str(model), "--output", str(output), *flags]
    done = subprocess.run([*command, "--overwrite"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((output / "llmq_report.json").read_text())["seconds"]["total"]


def write_questions(room: Path, most: int) -> tuple[Path, Path]:
    """Write the questions to train on and those to measure on, as conversations; return both files."""
    every = [json.dumps({"prompt": _QUESTION.format(said), "completion": answer}) for said, answer in _functions()]
    chosen = every[:: max(1, len(every) // most)]
    parts = {"train": [], "test": []}
    for i, line in enumerate(chosen):
        parts["test" if i % _TEST_EVERY == 0 else "train"].append(line)
    for name, lines in parts.items():
        (room / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return room / "train.jsonl", room / "test.jsonl"


def _functions() -> Iterator[tuple[str, str]]:
    """Yield what each function of CPython's library does, in its author's words, and its name in a fixed form."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and said and not node.name.startswith("_"):
                arguments = ", ".join(argument.arg for argument in node.args.args) or "none"
                answer = f"name: {node.name}\nmodule: {'.'.join(parts)}\narguments: {arguments}"
                yield " ".join(said.partition("\n\n")[0].split())[:400], answer


if __name__ == "__main__":
    run(FinetuneConfig, compare)
