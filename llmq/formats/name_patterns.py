"""Match names against the patterns of a checkpoint. A bad pattern takes no more than a second."""

import time

import regex

from llmq.core.errors import CheckpointError

# For all names and patterns of a checkpoint; good ones take milliseconds. It is CPU time, as `regex` counts it: a busy
# machine is no reason to refuse a checkpoint.
_SECONDS = 1.0
_LONGEST = 100_000


class Patterns:
    """Matches regular expressions that nobody has checked, within one time limit for all.

    Raises CheckpointError for a text that is no pattern, and for patterns that take exponential time.
    """

    def __init__(self) -> None:
        self._until = time.process_time() + _SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def match(self, pattern: str, name: str) -> bool:
        """Tell if the pattern fits the beginning of the name."""
        return self._run(pattern, name, anywhere=False)

    def search(self, pattern: str, name: str) -> bool:
        """Tell if the pattern fits anywhere in the name."""
        return self._run(pattern, name, anywhere=True)

    def _run(self, pattern: str, name: str, anywhere: bool) -> bool:
        """Match within the time that is left. Raise CheckpointError when it is over."""
        left = self._until - time.process_time()
        try:
            compiled = self._compile(pattern)
            run = compiled.search if anywhere else compiled.match
            if left > 0:
                return run(name, timeout=left) is not None
        except TimeoutError:
            pass
        raise CheckpointError(f"the pattern {pattern[:80]!r} takes too long to match layer names against; simplify it")

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        """Return the compiled pattern. Each is compiled once."""
        if pattern not in self._compiled:
            if len(pattern) > _LONGEST:
                raise CheckpointError(f"a pattern of {len(pattern)} characters; {_LONGEST} are enough for any model")
            try:
                self._compiled[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise CheckpointError(f"{pattern[:80]!r} is no regular expression ({error})") from None
        return self._compiled[pattern]
