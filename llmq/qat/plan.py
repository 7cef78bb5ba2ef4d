"""What `llmq.train --dry-run` says: what learns, and the memory and time that it takes."""

from collections.abc import Iterator

from torch import nn

from llmq.core.memory import free_memory, resident_now
from llmq.plan.render import gb
from llmq.qat.request import TrainRequest
from llmq.qat.timing import GROUP, seconds

# For each weight: V, its gradient, two moments of Adam (float32); one byte where codes stay.
_CODES, _BYTE = 16, 1
# For each group, of which a row has as many as with groups of GROUP: scale, zero, factor, its gradient, two moments.
_GROUP = 24
_MATRIX, _LEARNING = 4, 16  # of what is not packed: the weight alone; with its gradient and two moments
_LOGITS = 3 * 4  # three copies of a micro-batch's logits
_SAVED = 4  # for each input and output of a linear


def lines(request: TrainRequest) -> Iterator[str]:
    """Yield the plan as lines of text."""
    config, data = request.config, request.data
    packed, outside = sum(request.sizes.values()), request.outside
    whole = f"{(packed + outside) / 1e6:,.1f} million weights, {packed / 1e6:,.1f} of them packed"
    yield f"model     {config.model}, {whole}"
    what = {"scales": "scales, norms and biases", "codes": "codes, scales, norms and biases", "all": "all weights"}
    learns = f"LoRA adapters of rank {config.lora}" if config.lora else what[config.learn]
    yield f"learns    {learns}; loss: {config.loss}"
    average = data.tokens / len(data.train)
    yield f"data      {len(data.train)} sequences of {average:.0f} tokens on average; {len(data.held_out)} held out"
    if data.left_out:
        yield f"          {data.left_out}"
    if request.packed is None:
        yield f"start     {config.start} at {config.bits} bit; its own plan: llmq.quantize --dry-run"
    seen = round(config.steps * config.batch * average)
    yield f"steps     {config.steps} of {config.batch} sequences: {seen:,} tokens, each one {_times(seen, request)}"
    parts = memory(request)
    told = ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    free = free_memory(request.compute.device)
    yield f"memory    about {gb(sum(parts.values()))} ({told}); {gb(free)} are free"
    yield f"disk      about {gb(_disk(request))} in {config.output}; the result alone stays"
    yield f"time      about {seconds(request) / 60:.0f} minutes, by timing the parts of a step with random weights"


def memory(request: TrainRequest) -> dict[str, int]:
    """Return the bytes that the training takes, by what takes them. Only some layers may learn; that is left out."""
    config, compute = request.config, request.compute
    packed, outside = sum(request.sizes.values()), request.outside
    text = request.skeleton.config.get_text_config()
    tokens = config.micro_batch * max(len(example.ids) for example in request.data.train)
    sides = _sides(request)
    saved = sides
    if config.checkpointing:  # the inputs of blocks, and one block
        depth = max(1, text.num_hidden_layers)
        saved = sides // depth + 2 * depth * text.hidden_size
    layers = packed * (_CODES if config.learn != "scales" else _BYTE) + packed // GROUP * _GROUP
    return {
        "program": 0 if compute.device.type != "cpu" else resident_now(),
        "packed layers": packed * _BYTE + sides * config.lora * _LEARNING if config.lora else layers,
        "other weights": outside * (_LEARNING if config.learn == "all" else _MATRIX),
        "original": (packed + outside) * compute.dtype.itemsize * (config.needs_original or config.learn != "scales"),
        "activations": tokens * (_LOGITS * text.vocab_size + _SAVED * saved),
    }


def _disk(request: TrainRequest) -> int:
    """Return the bytes of the checkpoints of a training: two of them, with two moments of Adam for each parameter."""
    config, packed, outside = request.config, sum(request.sizes.values()), request.outside
    if config.lora:  # the dense sum, and what is quantized of it
        return 2 * 12 * _sides(request) * config.lora + 2 * (packed + outside) + 2 * (packed + 2 * outside)
    learning = packed // GROUP + packed * (config.learn != "scales") + outside * (config.learn == "all")
    return 2 * 12 * learning + 2 * (packed + 2 * outside)


def _sides(request: TrainRequest) -> int:
    """Return the inputs and outputs of all packed linears."""
    return sum(linear.in_features + linear.out_features for linear in _packed(request))


def _packed(request: TrainRequest) -> list[nn.Linear]:
    return [request.skeleton.get_submodule(name) for name in request.packed_names]


def _times(seen: int, request: TrainRequest) -> str:
    passes = seen / request.data.tokens
    return f"{passes:.1f} times"
