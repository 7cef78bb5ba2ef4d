"""Text generation whose decode step is made ready once: `fast_generate`, for any loaded model.

transformers' `generate` still reads the settings, and makes the logits processors and the stopping criteria. Only its
loop is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from llmq.runtime.decode_step import DecodeStep

_KEPT = "_llmq_decode_steps"
_KEPT_STEPS = 2  # numbers of sequences whose steps, with their caches, a model keeps
# Settings that another loop of transformers serves.
_OTHER_LOOPS: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value not in (None, 1),
    "use_cache": lambda value: value is False,
    **dict.fromkeys(
        ("prompt_lookup_num_tokens", "stop_strings", "cache_implementation"), lambda value: value is not None
    ),
    **dict.fromkeys(("return_dict_in_generate", "token_healing", "dola_layers", "penalty_alpha"), bool),
}
_OTHER_ARGUMENTS = ("assistant_model", "custom_generate", "synced_gpus", "tokenizer")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class Timing:
    """Where the time of one generation went, in seconds."""

    prompt_tokens: int = 0
    """Of one sequence, with its padding."""
    new_tokens: int = 0
    """Of one sequence. The first one comes with the prompt, the others from decode steps."""
    prefill_seconds: float = 0.0
    capture_seconds: float = 0.0
    """Steps that made others ready, when a model first generates or its text grows; and those that check them."""
    capture_steps: int = 0
    """How many those were. Each gave a token too."""
    decode_seconds: float = 0.0
    """All other steps."""

    @property
    def decode_rate(self) -> float:
        """Tokens a second of one sequence, of the steps in `decode_seconds`."""
        tokens = self.new_tokens - 1 - self.capture_steps
        return tokens / self.decode_seconds if tokens > 0 and self.decode_seconds > 0 else 0.0


@dataclass
class Generated:
    """What `fast_generate` returns."""

    sequences: Int64[Tensor, "b t"]
    """Prompts and new tokens, as transformers' `generate` returns them."""
    timing: Timing
    plain: str | None
    """Why the model's own `generate` ran, or why each step ran through the model itself; None if neither did."""


def fast_generate(
    model: Any,
    input_ids: Int64[Tensor, "b t"],
    attention_mask: Int64[Tensor, "b t"] | None = None,
    streamer: Any = None,
    **settings: Any,
) -> Generated:
    """Continue prompts as `model.generate` does, faster: the decode step is recorded, or captured as a CUDA graph.

    Args:
        model: a model of `llmq.load`, or of transformers. Load packed models with `merge=True`: that is faster.
        input_ids: the prompts, padded on the left.
        attention_mask: 0 for padding.
        streamer: as in transformers; gets the prompt, then each token.
        settings: as in transformers: max_new_tokens, do_sample, temperature, ... Where they ask for beams, for scores,
            or for a cache of their own, `model.generate` does the work; only its sequences are returned.

    What was made ready stays with the model, for its next prompts.
    """
    timing = Timing(prompt_tokens=input_ids.shape[1])
    inputs: dict[str, Any] = {"attention_mask": attention_mask, "streamer": streamer}
    steps = model.__dict__.setdefault(_KEPT, _Steps())
    plain = _other_loop(model, settings) or _other_loop_for(model, input_ids, attention_mask, settings)
    if plain is None and not steps.free.acquire(blocking=False):
        plain = "another call generates with this model"
    if plain is not None:
        started = time.perf_counter()
        output = model.generate(input_ids, **inputs, **settings)
        sequences = getattr(output, "sequences", output)
        timing.decode_seconds = time.perf_counter() - started
        timing.new_tokens = sequences.shape[1] - input_ids.shape[1]
        return Generated(sequences, timing, plain)
    loop = _Loop(timing, streamer, steps)
    try:
        sequences = model.generate(input_ids, **inputs, **settings, custom_generate=loop.run)
    finally:
        steps.free.release()
    return Generated(sequences, timing, loop.plain)


def _other_loop(model: Any, settings: dict[str, Any]) -> str | None:
    """Return why the loop below cannot serve a model or settings, or None."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} has no decode step that could be made ready"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if others:
        return f"its layers of type {', '.join(sorted(others))} have other caches"
    if len({str(tensor.device) for tensor in model.parameters()}) > 1:
        return "it is spread over several devices"
    given = settings.get("generation_config") or model.generation_config
    for name, elsewhere in _OTHER_LOOPS.items():
        value = settings.get(name, getattr(given, name, None))
        if elsewhere(value):
            return f"{name}={value} needs another loop"
    extra = [name for name, value in settings.items() if isinstance(value, Tensor) or name == "past_key_values"]
    extra += [name for name in _OTHER_ARGUMENTS if settings.get(name) is not None]
    return f"{', '.join(extra)} needs another loop" if extra else None


def _other_loop_for(model: Any, ids: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> str | None:
    """Return why the loop below cannot serve these prompts, or what surrounds the call, or None."""
    config, kind = model.config.get_text_config(decoder=True), model.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return "torch.autocast is on"
    if mask is not None and not bool(mask[:, -1].all()):
        return "there is padding on the right"
    if getattr(config, "alibi", False):
        return "its biases for positions have the length of the text"
    rope = getattr(config, "rope_parameters", None) or {}
    original = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    if "longrope" in str(rope) and original is not None:
        given = settings.get("generation_config") or model.generation_config
        new = settings.get("max_new_tokens") or getattr(given, "max_new_tokens", None)
        if ids.shape[1] <= original and (new is None or ids.shape[1] + new > original):
            return f"its rotations change after {original} tokens"
    return None


class _Loop:
    """The loop that transformers calls. It has the streamer: transformers does not hand it to custom loops."""

    def __init__(self, timing: Timing, streamer: Any, steps: _Steps) -> None:
        self.timing, self.streamer, self.steps, self.plain = timing, streamer, steps, None

    def run(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Return the prompts with their continuations."""
        started = time.perf_counter()
        batch, length = input_ids.shape
        step = self.steps.of(model, batch)
        before, spent = step.seconds, step.steps
        ids = input_ids.new_empty(batch, generation_config.max_length)
        ids[:, :length] = input_ids
        mask = inputs.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask
        logits = step.prefill(input_ids, mask, generation_config.max_length)
        unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        pad = _padding(generation_config)
        while True:
            if len(logits_processor):
                logits = logits_processor(ids[:, :length], logits.clone())  # which may be written into
            chosen = _chosen(logits, generation_config.do_sample)
            if pad is not None:
                chosen = torch.where(unfinished, chosen, pad)
            ids[:, length] = chosen
            length += 1
            if self.streamer is not None:
                self.streamer.put(chosen.cpu())
            unfinished &= ~stopping_criteria(ids[:, :length], None)
            done = not bool(unfinished.any())
            if length == input_ids.shape[1] + 1:
                self.timing.prefill_seconds = time.perf_counter() - started
                started = time.perf_counter()
            if done:
                break
            logits = step.logits(chosen)
        if self.streamer is not None:
            self.streamer.end()
        self.timing.capture_seconds, self.timing.capture_steps = step.seconds - before, step.steps - spent
        self.timing.decode_seconds = time.perf_counter() - started - self.timing.capture_seconds
        self.timing.new_tokens = length - input_ids.shape[1]
        self.plain = step.plain
        return ids[:, :length]


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    """Return one token per sequence [b]."""
    if sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)


def _padding(generation_config: Any) -> int | None:
    """Return what finished sequences are filled up with; None if no sequence ends before the others."""
    ends = generation_config.eos_token_id
    if ends is None:
        return None
    first = ends[0] if isinstance(ends, (list, tuple)) else ends
    return int(first if generation_config.pad_token_id is None else generation_config.pad_token_id)


class _Steps:
    """What a model keeps: steps by number of sequences. Copies and pickles of it begin without them."""

    def __init__(self) -> None:
        self.free, self.state = Lock(), None
        self.steps: dict[int, DecodeStep] = {}

    def __reduce__(self) -> Any:
        return _Steps, ()

    def __deepcopy__(self, _: Any) -> _Steps:
        return _Steps()

    def of(self, model: Any, batch: int) -> DecodeStep:
        """Return the step for a number of sequences; a new one if the model has changed."""
        state = _state_of(model)
        if self.state != state:
            self.state, self.steps = state, {}
        if batch not in self.steps:
            while len(self.steps) >= _KEPT_STEPS:
                del self.steps[next(iter(self.steps))]
            self.steps[batch] = DecodeStep(model, batch)
        return self.steps[batch]


def _state_of(model: Any) -> tuple[Any, ...]:
    """Return what changes when modules, hooks, tensors or most of their values do: a step is made for one state."""
    modules = [
        (id(m), m.training, id(m.__dict__.get("forward")), *m._forward_hooks, None, *m._forward_pre_hooks)
        for m in model.modules()
    ]
    tensors = [
        (t.data_ptr(), t.dtype, None if t.is_inference() else t._version)
        for t in (*model.parameters(), *model.buffers())
    ]
    return model.config._attn_implementation, tuple(modules), tuple(tensors)
