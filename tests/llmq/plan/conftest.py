"""Fixtures of the tests of plan/."""

import pytest

from llmq.models.safetensors_files import SafetensorsDirectory


@pytest.fixture
def unreadable(monkeypatch):
    """Let every attempt to read a weight fail."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsDirectory, "read", read)
