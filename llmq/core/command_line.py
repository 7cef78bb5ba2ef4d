"""How the user started this program."""

import shlex
import sys
from pathlib import Path


def program() -> str:
    """Return what starts the running program: `python -m llmq.quantize`, `llmq quantize`, `scripts/demo.py`."""
    path = Path(sys.argv[0])
    return f"python -m llmq.{path.stem}" if path.parent.name == "llmq" else sys.argv[0]


def command_line() -> str:
    """Return the whole command, as a shell takes it."""
    return " ".join([program(), shlex.join(sys.argv[1:])])
