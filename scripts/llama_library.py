"""The library of llama.cpp, opened with ctypes: fetched, checked, and its structures. llama_cpp.py makes use of it.

It comes with the npm package of node-llama-cpp. It needs glibc 2.34, and chooses the kernels of this CPU by itself. No
package on PyPI has all of it: llama-cpp-python compiles for ten minutes, and xllamacpp has no quantizer. Structures are
passed by value, and they change from version to version. So one version is pinned, and checked.
"""

from __future__ import annotations

import base64
import ctypes as c
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llmq.core.errors import WorkError

PACKAGE = "@node-llama-cpp/linux-x64@3.21.1"
VERSION = "0.4.0-dev"  # what this package's library says of itself
FOLDER = Path(__file__).parent.parent / ".venv-peers" / "llama.cpp"
_SHA512 = "Totj6RTDMGo3FoK2yNUaz/oGmZD0olAqTrRluFUWmu0kW2i9TOzHSW0OWCAiGkzRCVX0WsU2CyUQo/W2NYtdPA=="
_ERROR = 4  # the log level

_F, _I, _U, _P, _B = c.c_float, c.c_int32, c.c_uint32, c.c_void_p, c.c_bool
_LOG = c.CFUNCTYPE(None, _I, c.c_char_p, _P)


class ModelSettings(c.Structure):
    _fields_ = [("devices", _P), ("buffer_types", _P), ("gpu_layers", _I), ("split_mode", _I), ("load_mode", _I)]
    _fields_ += [("lazy_mode", _I), ("main_gpu", _I), ("tensor_split", _P), ("progress", _P), ("progress_data", _P)]
    _fields_ += [("overrides", _P), ("vocabulary_only", _B), ("check_tensors", _B), ("repack", _B), ("no_host", _B)]
    _fields_ += [("no_alloc", _B), ("load_mtp", _B)]


class ContextSettings(c.Structure):
    _fields_ = [("tokens", _U), ("batch", _U), ("ubatch", _U), ("sequences", _U), ("snapshots", _U)]
    _fields_ += [("outputs", _U), ("outputs_per_sequence", _U), ("threads", _I), ("batch_threads", _I), ("kind", _I)]
    _fields_ += [("rope", _I), ("pooling", _I), ("attention", _I), ("flash_attention", _I), ("rope_base", _F)]
    _fields_ += [("rope_scale", _F), ("yarn_ext", _F), ("yarn_attention", _F), ("yarn_fast", _F), ("yarn_slow", _F)]
    _fields_ += [("yarn_context", _U), ("defragment", _F), ("callback", _P), ("callback_data", _P), ("keys", _I)]
    _fields_ += [("values", _I), ("abort", _P), ("abort_data", _P), ("embeddings", _B), ("offload", _B)]
    _fields_ += [("no_perf", _B), ("offload_operations", _B), ("whole_window", _B), ("unified", _B), ("samplers", _P)]
    _fields_ += [("samplers_count", c.c_size_t), ("other", _P)]


class QuantizeSettings(c.Structure):
    _fields_ = [("threads", _I), ("file_type", _I), ("output_type", _I), ("embedding_type", _I)]
    _fields_ += [("requantize", _B), ("quantize_output", _B), ("only_copy", _B), ("pure", _B), ("keep_split", _B)]
    _fields_ += [("dry_run", _B), ("importance", _P), ("overrides", _P), ("tensor_types", _P), ("pruned", _P)]
    _fields_ += [("buffer", c.c_size_t)]


class Batch(c.Structure):
    _fields_ = [("count", _I), ("tokens", _P), ("embeddings", _P), ("positions", _P), ("sequence_counts", _P)]
    _fields_ += [("sequences", _P), ("outputs", _P)]


class Importance(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", _P), ("size", c.c_size_t)]


# Some of the defaults, among them the last field of each structure: if they are where they should be, so is the rest.
_DEFAULTS: dict[str, tuple[type[c.Structure], dict[str, Any]]] = {
    "llama_model_default_params": (
        ModelSettings,
        {"gpu_layers": -1, "load_mode": -1, "repack": True, "load_mtp": False},
    ),
    "llama_context_default_params": (
        ContextSettings,
        {"tokens": 512, "batch": 2048, "ubatch": 512, "threads": 4, "yarn_slow": -1.0, "keys": 1, "values": 1}
        | {"offload": True, "whole_window": True, "unified": False, "samplers_count": 0, "other": None},
    ),
    "llama_model_quantize_default_params": (
        QuantizeSettings,
        {"file_type": 7, "output_type": 43, "embedding_type": 43, "quantize_output": True}
        | {"pure": False, "buffer": 8 << 30},
    ),
}


def fetch(folder: Path = FOLDER) -> Path:
    """Return the folder of the libraries, downloaded with npm if need be. Raises WorkError if that fails."""
    libraries = folder / "package" / "bins" / "linux-x64"
    if libraries.exists():
        return libraries
    npm = shutil.which("npm")
    if npm is None:
        raise WorkError(f"llama.cpp comes with the npm package {PACKAGE}, but there is no npm here")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        command = [npm, "pack", "--silent", PACKAGE, "--pack-destination", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise WorkError(f"npm cannot fetch {PACKAGE}: {' '.join(done.stderr.split()) or 'it says nothing'}")
        archive = next(Path(name).glob("*.tgz"))
        if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != _SHA512:
            raise WorkError(f"npm fetched another file as {PACKAGE} than the one that is known here")
        with tarfile.open(archive) as packed:
            packed.extractall(name, filter="data")
        with suppress(OSError):  # another process was faster
            os.rename(Path(name) / "package", folder / "package")
    return libraries


@cache
def library() -> Any:
    """Return the library, fetched, opened and checked. Raises WorkError if it is not the version that is known here."""
    folder = fetch()
    try:
        opened = [c.CDLL(str(next(folder.glob(name)))) for name in ("libggml-base.so", "libggml.*.so", "libllama.*.so")]
    except (OSError, StopIteration) as error:
        raise WorkError(f"{folder}: llama.cpp does not open here ({error})") from None
    ggml, llama = opened[1:]
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(llama, name).restype = _P
    llama.llama_version.restype, llama.llama_get_logits.restype = c.c_char_p, c.POINTER(_F)
    llama.llama_vocab_is_eog.restype = _B
    if llama.llama_version().decode() != VERSION or not all(_as_known(llama, name) for name in _DEFAULTS):
        raise WorkError(f"{folder} holds llama.cpp {llama.llama_version().decode()}, not the {VERSION} of {PACKAGE}")
    llama.llama_log_set(_collect, None)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    return llama


def defaults(llama: Any, name: str) -> tuple[Any, bytes]:
    """Return a structure with its defaults, and the bytes behind it, which stay 0xFF if it is as long as it should be.

    A structure of this size is returned through a pointer that the caller gives.
    """
    kind = _DEFAULTS[name][0]
    memory = c.create_string_buffer(b"\xff" * 512, 512)
    getattr(llama, name)(c.byref(memory))
    return kind.from_buffer_copy(memory), memory.raw[c.sizeof(kind) :]


def _as_known(llama: Any, name: str) -> bool:
    found, behind = defaults(llama, name)
    return all(getattr(found, k) == v for k, v in _DEFAULTS[name][1].items()) and set(behind) == {0xFF}


_errors: list[str] = []


@_LOG
def _collect(level: int, text: bytes, _: Any) -> None:
    """Keep errors for messages; drop the rest of llama.cpp's log."""
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


def failed(what: str) -> WorkError:
    reason = "; ".join(_errors[-2:]) or "no reason given"
    _errors.clear()
    return WorkError(f"llama.cpp {what}: {reason}")
