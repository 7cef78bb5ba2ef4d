"""What all entry points share: arguments from a dataclass, errors as one or two lines, exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import tyro

from llmq.errors import LlmqError

Positional = tyro.conf.Positional
_Config = TypeVar("_Config")


def run(config: type[_Config] | Callable[..., _Config], work: Callable[[_Config], Any] = lambda _: None) -> NoReturn:
    """Parse the command line into `config`, do the work, exit: 0 done, 1 the work failed, 2 the request was wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
    try:
        work(tyro.cli(config))
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nerror: interrupted; nothing that looks like a finished checkpoint was left behind", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
