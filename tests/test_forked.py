"""A forked process is, from outside, what the same command is as a new Python."""

import os
import signal
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, ROOT, command, run
from forked import Forked, forking, run_forked


@pytest.mark.parametrize(
    "arguments", [("quantize", "--bits", "5"), ("quantise",), ()], ids=["refused", "unknown", "none"]
)
def test_exit_code_and_output_are_those_of_a_new_python(arguments):
    new, forked = run("llmq", *arguments), run_forked("llmq", *arguments)
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr)


def test_directory_and_environment_are_the_childs_alone(tmp_path):
    script, before = ROOT / "scripts" / "soak.py", dict(os.environ)
    seen = tmp_path / "seen"

    def tell():
        seen.write_text(f"{os.getcwd()} {os.environ['ONLY']} {os.getpid()}")

    with forking():
        process = subprocess.Popen(
            [sys.executable, str(script), "--help"], cwd=tmp_path, env={"ONLY": "here"}, preexec_fn=tell, stdout=-1
        )
        assert b"--times" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert seen.read_text() == f"{tmp_path} here {process.pid}"
    assert dict(os.environ) == before
    assert process.pid != os.getpid()


def test_a_signal_that_kills_it_is_its_exit_code():
    process = Forked(command("llmq.quantize", "--help"), env=ENVIRONMENT, stdout=-3, stderr=-3, preexec_fn=signal.pause)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_other_commands_are_not_forked():
    code = "import sys; print('torch' in sys.modules)"
    with forking():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")
