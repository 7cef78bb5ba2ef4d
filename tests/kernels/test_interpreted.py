"""Runs the tests marked `interpret`: Triton looks for its interpreter when it is imported, so they need a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_kernels_pass_their_tests_in_tritons_interpreter():
    marked = re.compile(
        r"mark\.interpret\b|^from oracle import .*\b(WHERE|FLOAT16)\b", re.MULTILINE
    )  # or by the parameters of oracle.py
    files = [path for path in sorted(HERE.glob("test_*.py")) if marked.search(path.read_text())]
    stems = [
        "test_dequantize_matmul",
        "test_experts_op",
        "test_gptq_columns",
        "test_op",
        "test_packed_experts",
        "test_packed_matmul",
    ]
    assert [path.stem for path in files] == stems
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "interpret", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    counts = dict(reversed(count.split()) for count in re.findall(r"\d+ [a-z]+", done.stdout.splitlines()[-1]))
    assert int(counts["passed"]) >= 180, report
    assert counts.keys() <= {"passed", "deselected", "warnings", "warning"}, report  # none skipped, none failed
