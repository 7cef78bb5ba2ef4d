"""Compare fine-tuning with and without quantization on a small task: the loss of answers that the model must write.

The task is made from Python's own library: the model is told what a function does, and answers with its name, module
and arguments in a fixed form. These models answer the same questions, none of which was trained on:

    original      as it is
    fine-tuned    in float, --steps steps
    each way      at each number of bits; `quantize` makes it of the fine-tuned model, `train` of the original

Rows are written at once. A second call with the same --room measures only the missing ones.

    python scripts/compare_finetuning.py --model demo --bits 8 4 --steps 200
"""

from __future__ import annotations

import ast
import json
import shlex
import sysconfig
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_methods import Row, earlier_rows
from compare_ptq_qat import commands_of, report_of
from transformers import PrinterCallback, Trainer, TrainingArguments

import llmq
from llmq.calibration.answers import examples
from llmq.calibration.block_runner import Compute
from llmq.cli import run
from llmq.core.device import product_dtype
from llmq.core.train_config import TrainConfig
from llmq.models.model_source import ModelSource
from llmq.qat.data import Data, collated, data_of
from llmq.qat.losses import Learner
from llmq.qat.trainer import Sequences, held_out_loss, optimizer_of

_QUESTION = "Which function of Python's library does this?\n\n{}"
_TEST_EVERY = 10
CPU = torch.device("cpu")
ROWS = "rows.jsonl"
ORIGINAL, TUNED = "original", "fine-tuned"
WAYS = (
    "fine-tuned, then gptq: quantize",
    "QAT: train --learn all --rate 0.001 --scale-rate 0.001 --outside-rate 5e-5",
)


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
    ways: tuple[str, ...] = WAYS
    """What to compare. Each is 'NAME: PROGRAM FLAGS'; the program is quantize or train."""
    sequence_length: int = 512
    """The most tokens of a question with its answer."""
    questions: int = 2000
    """Questions to train on, at most."""
    room: Path = Path("compare_finetuning")
    """Directory for the questions, the rows, the fine-tuned model and the last quantized one."""


def compare(config: FinetuneConfig) -> None:
    """Train and measure all models that have no row yet, then print the table in Markdown."""
    config.room.mkdir(parents=True, exist_ok=True)
    commands = commands_of(config.ways)
    ways = {f"{name} at {bits} bit": (bits, command) for bits in config.bits for name, command in commands.items()}
    given = {title: command for title, (_, command) in ways.items()}
    results = config.room / ROWS
    rows = {row["name"]: row for row in earlier_rows(results, common(config), "command", given)}
    with results.open("a") as file:
        for row in measured(config, {title: way for title, way in ways.items() if title not in rows}, rows):
            rows[row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    print("| model | loss of answers | seconds |\n|---|---|---|")
    for title in (ORIGINAL, TUNED, *ways):
        print(f"| {title} | {rows[title]['loss']:.4f} | {rows[title]['seconds']:.0f} |")


def measured(config: FinetuneConfig, ways: dict[str, tuple[int, str]], rows: Container[str]) -> Iterator[Row]:
    """Yield the missing rows: of the original and of the fine-tuned model if `rows` lacks them, and of `ways`."""
    train, test = write_questions(config.room, config.questions)
    settings = TrainConfig(
        config.model,
        config.room,
        (str(train),),
        steps=config.steps,
        batch=config.batch,
        micro_batch=config.batch,
        sequence_length=config.sequence_length,
    )
    compute = Compute(CPU, torch.float32, product_dtype(CPU))
    source, tuned, output = ModelSource(config.model), config.room / "float", config.room / "quantized"
    held_out = Data([], examples(test, source.tokenizer, settings.sequence_length)[0], [])

    def row(title: str, command: str, model: Any, seconds: float) -> Row:
        loss = held_out_loss(model, None, held_out, settings, compute)
        return {"settings": common(config), "name": title, "command": command, "loss": loss, "seconds": seconds}

    if ORIGINAL not in rows:
        yield row(ORIGINAL, "", source.load_all(CPU, torch.float32), 0.0)
    if TUNED not in rows:
        yield row(TUNED, "", *fine_tuned(config, settings, compute, tuned))
    for title, (bits, way) in ways.items():
        program, *flags = shlex.split(way)
        command = ["--output", str(output), "--overwrite", "--group-size", str(config.group_size), "--bits", str(bits)]
        command += ["--calibration", str(train), "--sequence-length", str(config.sequence_length)]
        if program == "quantize":
            command += ["--model", str(tuned), "--samples", "64", *flags]
        else:
            command += ["--model", config.model, "--data", str(train), "--steps", str(config.steps)]
            command += ["--batch", str(config.batch), "--micro-batch", str(config.batch), *flags]
        seconds = report_of(program, output, command)["seconds"]["total"]
        yield row(title, way, llmq.load(output, "cpu"), seconds)


def common(config: FinetuneConfig) -> Row:
    """Return the settings that all rows of one table share."""
    sizes = ("group_size", "steps", "batch", "rate", "sequence_length", "questions")
    return {"model": Path(config.model).name} | {name: getattr(config, name) for name in sizes}


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
