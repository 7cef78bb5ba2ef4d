"""Fixtures of the tests of plan/."""

import pytest

from llmq.models.safetensors_files import SafetensorsDirectory


@pytest.fixture
def unreadable(monkeypatch):
    """Let every attempt to read a weight fail."""

    def read_all(self, names):
        raise AssertionError(f"{names} were read")

    monkeypatch.setattr(SafetensorsDirectory, "read_all", read_all)
