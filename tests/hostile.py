"""Ways to damage a checkpoint: each takes the files of a sound one and changes them as a drawn example says.

A mutation returns whether what it left must be refused; what it says nothing about may load, if it computes what the
files then say.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostile_tensors import Files, Odd, header, header_length, shards, tensor
from hypothesis import strategies as st
from safetensors.torch import load
from strange import MODEL_KEYS, MODEL_TYPES, PATTERNS, QUANTIZATION_KEYS, VALUES, WORDS, strange

INDEX = "model.safetensors.index.json"
OUTSIDE = "outside"
"""Beside the damaged directory: a sound copy of all of its files, which must not be read."""
SECONDS = 20  # for one of them; a fiftieth is usual
MEMORY = 1 << 30  # bytes more than there were before


@contextmanager
def bounds() -> Generator[None]:
    """End what takes too long or too much memory."""

    class Hang(BaseException):
        pass

    def hang(*_: object) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain_words(error: Exception) -> str:
    """The message of an error, after checking that it can be shown to people."""
    message = str(error)
    assert len(message.splitlines()) <= 2, message
    assert len(message) < 1500
    assert message.replace("\n", "").isprintable(), message
    assert "MemoryError" not in message
    assert "allocate" not in message, message
    return message


def write(files: Files, directory: Path) -> None:
    """Make a directory of these files, odd ones included."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "link":
            path.symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


def truncated(draw: Callable[..., Any], files: Files) -> bool:
    """A file ends too early."""
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    files[name] = content[: draw(st.integers(0, len(content) - 2))]
    return name not in ("quantize_config.json", "generation_config.json")


def index(draw: Callable[..., Any], files: Files) -> bool:
    """The index names other files, or is none."""
    table = (
        json.loads(files[INDEX])
        if INDEX in files
        else {"weight_map": dict.fromkeys(load(files[shards(files)[0]]), shards(files)[0])}
    )
    names = table["weight_map"]
    targets = ["../outside/{}", "{}/../{}", "./{}", "../../../etc/passwd", "/dev/zero", "/etc/passwd", "..", ".", ""]
    targets += ["config.json", "{}\0", "x" * 300, "a/{}", "nothing.safetensors", "~/{}", "{} "]
    what = draw(st.sampled_from(["file", "file", "all files", "rename", "replace", "drop"]))
    chosen = draw(st.sampled_from(sorted(names)))
    if what == "file":
        names[chosen] = draw(st.sampled_from(targets) | strange)
    elif what == "all files":
        target = draw(st.sampled_from(targets))
        table["weight_map"] = {name: target.replace("{}", shard) for name, shard in names.items()}
    elif what == "rename":
        names[draw(st.sampled_from([*WORDS, chosen + ".x"]))] = names.pop(chosen)
    elif what == "drop":
        del names[chosen]
    else:
        table["weight_map"] = draw(strange)
    if isinstance(names.get(chosen), str):
        names[chosen] = names[chosen].replace("{}", shards(files)[0])
    files[INDEX] = _json(table)
    return what in ("file", "all files", "replace", "rename") and "model.safetensors" not in files  # which comes first


def text(draw: Callable[..., Any], files: Files) -> bool:
    """The bytes of a JSON file are others, whether or not they are still JSON."""
    name = draw(st.sampled_from(sorted(name for name in files if name.endswith(".json"))))
    content = files[name]
    pieces = [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"\xff\xfe",
        b"\0",
    ]
    pieces += [
        b"null",
        b"{}",
        b'"\\ud800"',
        b"\xef\xbb\xbf",
        b"}",
        b"]",
        b",",
        b'"',
        b'"bits": 0,',
        b"1" * 400,
        b"true",
    ]
    piece = draw(st.sampled_from(pieces) | st.binary(max_size=4))
    begin = draw(st.integers(0, len(content)))
    if draw(st.booleans()):  # in place of a value, so that it often is JSON still
        starts = [i + 2 for i in range(len(content)) if content[i : i + 2] == b": "]
        begin = draw(st.sampled_from(starts))
        end = min(i for i in (content.find(stop, begin) for stop in (b",", b"\n", b"}")) if i >= 0)
    else:
        end = begin + draw(st.integers(0, 20))
    files[name] = content[:begin] + piece + content[end:]
    return False


def sizes(draw: Callable[..., Any], files: Files) -> bool:
    """config.json asks for another model, or for an absurd one."""
    config = json.loads(files["config.json"])
    known = sorted(config.keys() - {"quantization_config", "quantization"})
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        key = draw(st.sampled_from(known + MODEL_KEYS))
        value = draw(st.sampled_from(MODEL_TYPES) | strange) if key == "model_type" else draw(strange)
        if isinstance(config.get(key), dict) and draw(st.booleans()):
            config[key] = config[key] | {draw(st.sampled_from([*config[key], "factor", "type", "rope_type"])): value}
        else:
            config[key] = value
    files["config.json"] = _json(config)
    return False


def quantization(draw: Callable[..., Any], files: Files) -> bool:
    """quantization_config says something else about the same tensors."""
    config = json.loads(files["config.json"])
    tree = config["quantization"] if "quantization" in config else config["quantization_config"]
    while True:
        key = draw(st.sampled_from([*tree, *QUANTIZATION_KEYS]))
        if not (isinstance(tree.get(key), dict) and tree[key] and draw(st.booleans())):
            break
        tree = tree[key]
    said = st.sampled_from([*VALUES, *(int(n) for n in range(9)), 32, 40, 128, -1])
    patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)
    rules = st.dictionaries(
        st.sampled_from(PATTERNS),
        st.just({}) | st.dictionaries(st.sampled_from(QUANTIZATION_KEYS), said | strange),
        min_size=1,
        max_size=3,
    )
    value = draw(strange | said | patterns | rules)
    if key in tree and draw(st.sampled_from([False, False, True])):
        del tree[key]
    else:
        tree[key] = value
    files["config.json"] = _json(config)
    return False


def flipped(draw: Callable[..., Any], files: Files) -> bool:
    """A few bytes of a file are others."""
    name = draw(st.sampled_from(sorted(files) + shards(files) * 3))
    content = bytearray(files[name])
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, 10**6)) * 7919 % len(content)] = draw(st.integers(0, 255))
    files[name] = bytes(content)
    return False


def links(draw: Callable[..., Any], files: Files) -> bool:
    """Something else lies where a file should."""
    name = draw(st.sampled_from(sorted(files)))
    kind = draw(
        st.sampled_from(["out", "absolute", "loop", "nowhere", "inside", "device", "pipe", "folder", "nothing"])
    )
    if kind == "inside":
        files["moved"] = files[name]
    aims = {"out": f"../{OUTSIDE}/{name}", "loop": name, "nowhere": "nothing", "inside": "moved", "device": "/dev/zero"}
    aims["absolute"] = "/proc/self/environ"
    if kind == "nothing":
        del files[name]
    else:
        files[name] = Odd("link", aims[kind]) if kind in aims else Odd(kind)
    optional = name in ("quantize_config.json", "generation_config.json")
    return kind != "inside" and not (optional and kind in ("nothing", "folder"))


KINDS = (truncated, header, header_length, tensor, index, text, sizes, quantization, flipped, links)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode("utf-8", "surrogatepass")
