"""Checkpoints to verify, sound ones and copies to damage."""

import shutil

import pytest
from packed import pack

from llmq.verification import check as checking


@pytest.fixture(scope="module")
def sound(tmp_path_factory, llama):
    return pack(llama, tmp_path_factory.mktemp("sound") / "packed")


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "packed")


@pytest.fixture
def never_whole(monkeypatch):
    """Fail if the whole model is loaded."""

    def load(*_):
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr(checking, "load", load)
