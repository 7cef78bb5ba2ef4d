"""Checks every call of llmq against the annotations, shapes included, at a third of the cost of jaxtyping's own way.

The import hook of jaxtyping decorates every function with `jaxtyping.jaxtyped`. That binds and checks the arguments
twice in each call, and it compiles its checks anew whenever a function inside a function is made: half of the time of
all tests. `jaxtyped` here takes its place. It checks the same: all arguments before a call, the result after it, and
one value for each dimension's name within a call. It compiles a check when it is first needed, and only once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped
_ONE_CALL = _jaxtyped("context")  # inside, a dimension's name has one value
_COMPILED: dict[types.CodeType, list[tuple[Any, Callable[..., Any]]]] = {}


def install() -> None:
    """Make jaxtyping's import hook decorate with the function below."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Return a function or class with its calls checked; the class is a dataclass, or nothing is added to it."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = jaxtyped(function.__init__, typechecker=typechecker)
        return function
    if not isinstance(function, types.FunctionType) or inspect.isgeneratorfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    if not function.__annotations__:
        return function
    checked = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        nonlocal checked
        if checked is None:
            checked = _checked(function)
        with _ONE_CALL:
            return checked(*args, **kwargs)

    return call


def _checked(function: types.FunctionType) -> Callable[..., Any]:
    """Return the function as beartype checks it. All functions made of the same code share what was compiled."""
    same = _COMPILED.setdefault(function.__code__, [])
    written = function.__annotations__
    for earlier, template in same:
        if earlier == written and template.__globals__ is function.__globals__:
            copy = types.FunctionType(template.__code__, template.__globals__, template.__name__)
            copy.__kwdefaults__ = {**template.__kwdefaults__, "__beartype_func": function}
            return copy
    function.__annotations__ = {name: _hint(written[name], function.__globals__) for name in written}
    try:
        checked = beartype(function)
    finally:
        function.__annotations__ = written
    if "__beartype_func" in (checked.__kwdefaults__ or {}):  # it checks anything at all
        same.append((written, checked))
    return checked


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    """Return what an annotation stands for; Any if it uses a name that only type checkers import."""
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names, None, True)["it"]
    except Exception:
        return Any
