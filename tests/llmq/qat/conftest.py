import pytest
from small_runs import run
from tiny import some_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(some_text())
    return path


@pytest.fixture(scope="module")
def packed(llama, text, tmp_path_factory):
    return run(llama, text, tmp_path_factory.mktemp("packed") / "out", bits=2)
