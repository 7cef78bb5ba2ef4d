"""Settings all tests share."""

import importlib.util
import os
import re

# Tests must not depend on a network; the hub test points these at its own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock, tqdm

if importlib.util.find_spec("beartype"):  # a machine that is lent for its GPU may lack it
    import shape_checks

    shape_checks.install()  # before anything imports llmq
# Forked children would share this lock. One that is killed while it draws a bar keeps it, and all others wait for ever.
TqdmDefaultWriteLock.mp_lock = None
tqdm.monitor_interval = 0  # its thread could hold another lock while this process forks


def pytest_ignore_collect(collection_path, config):
    """Leaves out files without a GPU test if such tests are asked for: they import what a GPU machine may lack."""
    words = config.option.markexpr.split()
    if "gpu" in words and "not" not in words and collection_path.suffix == ".py":
        has_some = re.search(r"mark\.gpu\b|^from oracle\b", collection_path.read_text(encoding="utf-8"), re.MULTILINE)
        return None if has_some else True
    return None


def pytest_collection_modifyitems(config, items):
    """Leaves out, before anything counts them, tests for another process (the interpreter's) or machine (a GPU's).

    A process steals from the end of what is left for another one. So what should stay together comes first.
    """
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    here = {"interpret": interpreted, "gpu": torch.cuda.is_available() and not interpreted}
    elsewhere = [item for item in items if any(item.get_closest_marker(name) and not here[name] for name in here)]
    config.hook.pytest_deselected(items=elsewhere)
    left = (item for item in items if item not in elsewhere)
    items[:] = sorted(left, key=lambda item: item.get_closest_marker("together") is None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without a C compiler, where torch's int4 matmul serves few tokens."""
    from llmq_kernels.cpu_native import library

    monkeypatch.setenv("LLMQ_NATIVE", "0")
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Directory of a tiny Llama with grouped-query attention, float32."""
    from tiny import save_tiny  # transformers takes seconds to import, and tests of kernels do without

    return save_tiny(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory):
    """The same with three blocks, one of which lies between others."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("llama"), "llama-gqa", num_hidden_layers=3)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """Directory of a tiny Gemma 2, bfloat16."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("gemma"), "gemma2", torch.bfloat16)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A .txt with about 12,000 tokens for the tiny tokenizer."""
    from tiny import some_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_text())
    return path
