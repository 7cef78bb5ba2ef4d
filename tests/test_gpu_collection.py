"""The GPU tests are collected without beartype, tyro and pytest-timeout, which a GPU machine may lack."""

import re

from commands import execute_python

# torch says that there is a GPU, or the tests would be left out.
WITHOUT = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("beartype", "tyro", "pytest_timeout"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "beartype" else find(name, package)
import pytest, torch
torch.cuda.is_available = lambda: True
options = ["-o", "addopts=", "--import-mode=importlib", "--strict-markers", "-p", "no:timeout", "-p", "no:cacheprovider"]
for marker in ("gpu", "gpu and smoke"):
    print("MARKER", flush=True)
    assert pytest.main([*options, "--collect-only", "-q", "-m", marker, "tests"]) == 0
"""  # noqa: E501


def test_all_gpu_tests_are_collected_and_some_of_each_kernel_are_run_first():
    _, everything, first = execute_python(WITHOUT).split("MARKER\n")
    tests, smoke = (
        re.findall(r"^tests/(.*)::.*?(?:\[(.*)-\w+\])?$", text, re.MULTILINE) for text in (everything, first)
    )
    assert len(tests) > 515
    assert "llmq/runtime/test_cuda.py" in {file for file, _ in tests}
    assert 15 <= len(smoke) <= 40
    assert {f"{bits}-sym-128" for bits in (2, 3, 4, 5, 6, 8)} <= {name for _, name in smoke}
    assert {file.rpartition("/")[2] for file, _ in smoke} == {
        *("test_packed_matmul.py", "test_packed_experts.py", "test_op.py", "test_gptq_columns.py")
    }
