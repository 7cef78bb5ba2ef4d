"""Tells what a training did: in llmq_report.json, and in a few lines on the screen."""

from pathlib import Path
from typing import Any

from llmq.core.distributed import processes
from llmq.core.memory import gpu_peak
from llmq.qat.layers import start_report
from llmq.qat.outcome import Outcome
from llmq.qat.request import TrainRequest
from llmq.run.report import heading
from llmq.verification.stated_share import SHARE


def trained(request: TrainRequest, outcome: Outcome, merged: float | None, result: Path) -> dict[str, Any]:
    """Return the report of a training. What the report of its start, or of its merge, says of layers stays in it.

    `merged`: the loss after adapters were merged. `result`: the checkpoint that is written again.
    """
    config, data, before = request.config, request.data, start_report(result)
    entry = {
        "loss": config.loss,
        "held_out": [outcome.before, outcome.after],
        "steps": outcome.steps,
        "tokens_seen": round(outcome.steps * config.batch * processes() * data.tokens / len(data.train)),
        "sequences": len(data.train),
        "learned_tokens": sum(int((example.labels >= 0).sum()) for example in data.train),
        "history": outcome.history,
        "merged": merged,
    }
    notes = [{"where": "data", "note": data.left_out}] if data.left_out else []
    if not outcome.changed:
        none = "no state was better on held-out sequences: nothing was changed"
        none += ", but inputs got their scales" if config.activation_scheme == "static" else ""
        notes.append({"where": "training", "note": none})
    if merged is not None and merged >= outcome.before:
        worse = (
            "quantized again, the sum with the adapters was worse than the start, so the packed weights are the start's"
        )
        notes.append({"where": "adapters", "note": worse})
    kept = {key: before[key] for key in (SHARE, "packed_share", "in_float", "groups") if key in before}
    return {
        **heading(config),
        **({} if gpu_peak() is None else {"gpu_peak_bytes": gpu_peak()}),
        "trained": entry,
        "notes": [*before.get("notes", ()), *notes],
        **kept,
    }


def shown(report: dict[str, Any], output: Path) -> str:
    """Return the summary of a training for the screen."""
    entry = report["trained"]
    loss = "{:.4f}, after training {:.4f}".format(*entry["held_out"])
    lines = [f"note: {each['where']}: {each['note']}" for each in report["notes"]]
    lines.append(f"{entry['loss']} loss on held-out sequences {loss} (step {_best_step(entry)} of {entry['steps']})")
    if entry["merged"] is not None:
        lines.append(f"after the adapters were merged and quantized again {entry['merged']:.4f}")
    memory = f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB"
    lines.append(f"{report['seconds']['total']:.1f} s; {entry['tokens_seen']:,} tokens seen; {memory}")
    return "\n".join([*lines, f"wrote {output}"])


def _best_step(entry: dict[str, Any]) -> int:
    """Return the step of the best state; 0 for the start."""
    checks = [check for check in entry["history"] if check["loss"] < entry["held_out"][0]]
    return min(checks, key=lambda check: check["loss"])["step"] if checks else 0
