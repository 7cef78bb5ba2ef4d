"""Ways to damage a .gguf file: each takes a sound one apart, changes a part as drawn, and puts it together again.

A mutation returns whether what it left must be refused, as in hostile.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from gguf_parts import ARRAY, FORMATS, STRING, Taken, text_of
from hypothesis import strategies as st

KEYS = [
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.attention.sliding_window",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.attn_factor",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token",
    "general.alignment",
    "llmq.scale_dtype",
    "general.quantized_by",
    "GGUF.version",
]
TEXTS = [
    "",
    "llama",
    "qwen2",
    "qwen3moe",
    "gemma3",
    "mistral",
    "gpt2",
    "phi3",
    "t5",
    "nothing",
    "x" * 5000,
    "\x00",
    "ü",
    "longrope",
]
TEXTS += [
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "llmq 0.1.0",
    "{{ 1/0 }}",
    "\n",
    "../../etc/passwd",
    "999999999999",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    5,
    7,
    31,
    33,
    63,
    65,
    97,
    255,
    1 << 15,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 64) - 1,
]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-5, 0.5, 1e30, 3e38, float("inf"), float("-inf"), float("nan")]
NAMES = ["rope_freqs.weight", "rope_factors_long.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"]
NAMES += ["blk.0.attn_q.bias", "token_embd.weight", "blk.0.ffn_gate_exps.weight", "", "x" * 3000, "a\nb"]


def scalar(draw: Callable[..., Any], kind: int) -> bytes:
    """A strange value of this type."""
    if kind == STRING:
        return text_of(draw(st.sampled_from(TEXTS) | st.text(max_size=5)).encode("utf-8", "surrogatepass"))
    layout = FORMATS[kind]
    if kind in (6, 12):
        return struct.pack(layout, draw(st.sampled_from(FLOATS)))
    size = struct.calcsize(layout)
    return (draw(st.sampled_from(NUMBERS) | st.integers(0, 100)) % (1 << 64)).to_bytes(8, "little")[:size]


def any_value(draw: Callable[..., Any], kind: int) -> bytes:
    if kind != ARRAY:
        return scalar(draw, kind)
    inner, count = draw(st.sampled_from([*FORMATS, STRING])), draw(st.integers(0, 4))
    said = draw(st.sampled_from([count, count, count, 1 << 62]))
    return struct.pack("<IQ", inner, said) + b"".join(scalar(draw, inner) for _ in range(count))


def value(draw: Callable[..., Any], file: Taken) -> bool:
    """Metadata have other values, types or names, or are missing."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        # Keys of the model, far more often than those of the tokenizer.
        mine = [i for i, (name, _, _) in enumerate(file.keys) if name.startswith((b"llama.", b"general.arch", b"llmq"))]
        at = draw(st.sampled_from(mine * 5 + [*range(len(file.keys))]))
        name, kind, content = file.keys[at]
        what = draw(st.sampled_from(["value"] * 6 + ["type", "drop", "name", "twice"]))
        if what == "value":
            file.keys[at] = name, kind, any_value(draw, kind)
        elif what == "type":
            other = draw(st.sampled_from([*FORMATS, STRING, ARRAY]))
            file.keys[at] = name, other, any_value(draw, other)
        elif what == "drop":
            del file.keys[at]
        elif what == "twice":
            file.keys.append((name, kind, content))
            return True
        else:
            file.keys[at] = draw(st.sampled_from(KEYS)).encode(), kind, content
    return False


def more_values(draw: Callable[..., Any], file: Taken) -> bool:
    """There are further metadata."""
    known = {name for name, _, _ in file.keys}
    for name in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True)):
        if name.encode() not in known:
            kind = draw(st.sampled_from([4, 5, 6, 7, STRING, ARRAY, 12]))
            file.keys.append((name.encode(), kind, any_value(draw, kind)))
    return False


def tensor(draw: Callable[..., Any], file: Taken) -> bool:
    """A tensor has another shape, type, place or name, or is missing."""
    at = draw(st.integers(0, len(file.tensors) - 1))
    name, shape, kind, place = file.tensors[at]
    what = draw(st.sampled_from(["side", "shape", "type", "place", "name", "drop", "twice", "new"]))
    if what == "side":
        shape = [*shape]
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(NUMBERS) | st.integers(0, 200)) % (1 << 64)
    elif what == "shape":
        shape = draw(
            st.lists(st.sampled_from([0, 1, 2, 32, 64, 96, 1 << 31, 1 << 32]), max_size=6) | st.just(shape[::-1])
        )
    elif what == "type":
        kind = draw(st.integers(0, 45) | st.sampled_from(NUMBERS)) % (1 << 32)
    elif what == "place":
        place = draw(st.sampled_from(NUMBERS) | st.integers(0, len(file.data))) % (1 << 64)
    elif what == "name":
        name = draw(st.sampled_from(NAMES)).encode()
    elif what == "new":
        new = draw(st.sampled_from(NAMES)).encode()
        file.tensors.append(
            (new, draw(st.sampled_from([[8], [1], [64], shape])), draw(st.sampled_from([0, 1, 2])), place)
        )
        return False
    if what == "drop":
        del file.tensors[at]
    elif what == "twice":
        file.tensors.append(file.tensors[at])
        return True
    else:
        file.tensors[at] = name, shape, kind, place
    return what == "drop" and name != b"output.weight"  # without one, embeddings are used


def promises(draw: Callable[..., Any], file: Taken) -> bool:
    """Version and counts are others."""
    if draw(st.booleans()):
        file.version = draw(st.sampled_from([0, 1, 2, 4, 1 << 16, 3 << 24]))
        return file.version != 2
    file.counts[draw(st.integers(0, 1))] = draw(st.sampled_from([-1, 1, 1 << 20, 1 << 40, 1 << 63]))
    return False


def data(draw: Callable[..., Any], file: Taken) -> bool:
    """Some bytes of the weights are others."""
    content = bytearray(file.data)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, 10**6)) * 7919 % len(content)] = draw(st.integers(0, 255))
    file.data = bytes(content)
    return False


PARTS = (value, value, value, more_values, tensor, tensor, promises, data)


def parts(draw: Callable[..., Any], content: bytes) -> tuple[bytes, bool, str]:
    """What is left of a file with a part that is damaged, whether it must be refused, and what was done."""
    change, file = draw(st.sampled_from(PARTS)), Taken.of(content)
    must_refuse = change(draw, file)
    return file.whole(), must_refuse, change.__name__


def truncated(draw: Callable[..., Any], content: bytes) -> tuple[bytes, bool, str]:
    """The file ends too early."""
    return content[: draw(st.integers(0, len(content) - 64))], True, "truncated"


def flipped(draw: Callable[..., Any], content: bytes) -> tuple[bytes, bool, str]:
    """A few bytes are others, in the header above all."""
    header = len(content) - len(Taken.of(content).data)
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = header if draw(st.booleans()) else len(content)
        changed[draw(st.integers(0, 10**6)) * 7919 % end] = draw(st.integers(0, 255))
    return bytes(changed), False, "flipped"


def spliced(draw: Callable[..., Any], content: bytes) -> tuple[bytes, bool, str]:
    """Something is put in, or taken out, or follows at the end."""
    header = len(content) - len(Taken.of(content).data)
    at = draw(st.integers(0, header) | st.just(len(content)))
    piece = draw(st.binary(max_size=9) | st.just(bytes(100_000)))
    return content[:at] + piece + content[at + draw(st.integers(0, 9)) :], False, "spliced"


KINDS = (parts, parts, parts, truncated, flipped, spliced)
