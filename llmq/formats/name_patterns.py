"""Match names against the patterns of a checkpoint. A bad pattern takes no more than a second."""

import re
import time
from collections.abc import Iterable

import regex

from llmq.core.errors import CheckpointError

# For all names and patterns of a checkpoint; good ones take milliseconds. It is CPU time, as `regex` counts it: a busy
# machine is no reason to refuse a checkpoint.
_SECONDS = 1.0
_LONGEST = 100_000

_EXPERT = re.compile(r"(.*\bexperts)\.[0-9]+\.[^.]+")
# What engines call the linears of an expert, whatever the files do. SGLang looks for the first three.
_OF_EXPERTS = r"\.[0-9]+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"


def without_experts(names: Iterable[str], others: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Return the names that are no linears of experts, and the names of the modules of all experts among them.

    `others`: names of linears with other settings. The experts of a module that has some of them stay single names.
    """
    apart = {found[1] for name in others if (found := _EXPERT.fullmatch(name))}
    single, modules = list[str](), dict[str, None]()
    for name in names:
        found = _EXPERT.fullmatch(name)
        if found is None or found[1] in apart:
            single.append(name)
        else:
            modules[found[1]] = None
    return single, list(modules)


def pattern_of_experts(module: str) -> str:
    """Return a pattern for the linears of all experts of a module. Engines look for one of them, by several names."""
    return re.escape(module) + _OF_EXPERTS


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
