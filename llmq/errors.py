"""The errors a user can cause. Each message names the rule, the value and the way out, in one or two lines."""


class LlmqError(Exception):
    """Anything llmq refuses or fails at on purpose; entry points print it without a traceback."""

    exit_code = 1


class RequestError(LlmqError):
    """The request itself was wrong: nothing was computed and nothing was written (exit code 2)."""

    exit_code = 2


class WorkError(LlmqError):
    """The request was sound but the work failed: corrupt input, full disk, NaN weights (exit code 1)."""


class CheckpointError(WorkError):
    """A checkpoint on disk is missing, truncated, inconsistent or of a kind llmq does not read."""
