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
_COMPILED: dict[types.CodeType, list[tuple[Any, dict[str, Any], Callable[..., Any]]]] = {}


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
    compiled, written = _COMPILED.setdefault(function.__code__, []), function.__annotations__
    equal = (made for hints, names, made in compiled if hints == written and names is function.__globals__)
    template = next(equal, None)
    if template is None:
        template = beartype(_twin(function))
        compiled.append((written, function.__globals__, template))
    if "__beartype_func" not in (template.__kwdefaults__ or {}):  # it checks nothing at all
        return function
    copy = types.FunctionType(template.__code__, template.__globals__, template.__name__)
    copy.__kwdefaults__ = {**template.__kwdefaults__, "__beartype_func": function}
    return copy


def _twin(function: types.FunctionType) -> types.FunctionType:
    """Return a function with the same signature that refers to nothing: what is compiled is kept for ever."""
    cells = tuple(types.CellType() for _ in function.__code__.co_freevars)
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__, twin.__module__ = function.__kwdefaults__, function.__module__
    twin.__qualname__ = function.__qualname__
    written = function.__annotations__
    twin.__annotations__ = {name: _hint(written[name], function.__globals__) for name in written}
    return twin


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    """Return what an annotation stands for; Any if it uses a name that only type checkers import."""
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names, None, True)["it"]
    except Exception:
        return Any
