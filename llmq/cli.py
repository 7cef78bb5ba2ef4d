"""Runs a command: arguments from a dataclass, errors as one or two lines, exit codes."""

import io
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from llmq.core.command_line import program
from llmq.core.errors import LlmqError, RequestError

Positional = tyro.conf.Positional
_Config = TypeVar("_Config")


def run(config: type[_Config] | Callable[..., _Config], work: Callable[[_Config], Any] = lambda _: None) -> NoReturn:
    """Parse the command line into `config`, do the work and exit.

    Exit codes: 0 done, 1 the work failed or was interrupted, 2 the request was wrong.
    """
    received = _interruptions()
    try:
        work(_parse(config))
    except (LlmqError, KeyboardInterrupt) as error:
        if received or isinstance(error, KeyboardInterrupt):
            print("\nerror: interrupted before the work was done", file=sys.stderr)
            sys.exit(1)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _interruptions() -> list[int]:
    """Let SIGTERM raise KeyboardInterrupt, like Ctrl-C. Return a list that collects the numbers of received signals.

    The list is needed because C code may turn a KeyboardInterrupt into another error.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore SIGINT
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    return received


def _parse(config: type[_Config] | Callable[..., _Config]) -> _Config:
    """Parse the command line. Raises RequestError with the words of tyro, which prints them in a box of many lines."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(config, prog=program())
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = " ".join(line.strip("╭╮╰╯─│ ") for line in box.getvalue().splitlines())
        message = " ".join(words.partition("For full helptext")[0].split())
        for title in ("Value error ", "Missing argument ", "Unrecognized options "):
            message = message.removeprefix(title)
        raise RequestError(f"{message}\n--help lists all options") from None
