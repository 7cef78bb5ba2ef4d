"""What all entry points share: arguments from a dataclass, errors as one or two lines, exit codes."""

from __future__ import annotations

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
    """Parse the command line into `config`, do the work, exit: 0 done, 1 the work failed, 2 the request was wrong."""
    received = _interruptions()
    try:
        work(_parse(config))
    except (LlmqError, KeyboardInterrupt) as error:
        if received or isinstance(error, KeyboardInterrupt):
            print("\nerror: interrupted before it was done", file=sys.stderr)
            sys.exit(1)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _interruptions() -> list[int]:
    """Let a polite kill clean up like Ctrl-C. Returns a list that gets the number of every such signal: where one meets
    C code, what comes out of it may be another error than KeyboardInterrupt."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which background jobs of a shell ignore
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    return received


def _parse(config: type[_Config] | Callable[..., _Config]) -> _Config:
    """tyro explains a wrong command line in a box of many lines; keep its words and drop the box."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(config, prog=program())
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = " ".join(line.strip("╭╮╰╯─│ ") for line in box.getvalue().splitlines())
        what = " ".join(words.partition("For full helptext")[0].split())
        for title in ("Value error ", "Missing argument ", "Unrecognized options "):
            what = what.removeprefix(title)
        raise RequestError(f"{what}\n--help lists every option") from None
