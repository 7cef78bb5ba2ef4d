"""The errors a user can cause. Each message names the rule, the value and the way out, in one or two lines."""

_LONGEST = 600  # characters of a line


class LlmqError(Exception):
    """An error that llmq raises on purpose. Programs print its message without a traceback."""

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


def first_line(error: Exception) -> str:
    """Return the first line of an error, with the next one if the first ends with a colon."""
    first, *rest = str(error).strip().splitlines() or ["no reason given"]
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:300]


def _readable(message: str) -> str:
    """Return at most two printable lines, even if the message quotes strange names of files or tensors."""
    first, _, rest = message.partition("\n")
    lines = (first, " ".join(rest.split("\n"))) if rest else (first,)
    shown = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:_LONGEST]) for line in lines)
    return "\n".join(line[:_LONGEST] for line in shown)
