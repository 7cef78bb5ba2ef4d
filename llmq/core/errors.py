"""The errors a user can cause. Each message names the rule, the value and the way out, in one or two lines."""

_LONGEST = 600  # characters of a line


class LlmqError(Exception):
    """Anything llmq refuses or fails at on purpose; entry points print it without a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_readable(message))


class RequestError(LlmqError):
    """The request itself was wrong: nothing was computed and nothing was written (exit code 2)."""

    exit_code = 2


class WorkError(LlmqError):
    """The request was sound but the work failed: corrupt input, full disk, NaN weights (exit code 1)."""


class CheckpointError(WorkError):
    """A checkpoint on disk is missing, truncated, inconsistent or of a kind llmq does not read."""


def _readable(message: str) -> str:
    """Two lines of printable characters at most, whatever the names of files and tensors that a message quotes."""
    first, _, rest = message.partition("\n")
    lines = (first, " ".join(rest.split("\n"))) if rest else (first,)
    shown = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:_LONGEST]) for line in lines)
    return "\n".join(line[:_LONGEST] for line in shown)
