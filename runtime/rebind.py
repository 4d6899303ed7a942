"""A function of another package with some of its global names bound to other values."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


def rebound(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The same function, in a world where `names` mean something else.

    Nothing of the other package is changed. Raises TypeError where the function does not use one
    of the names: it is another version of the package then.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is not a plain function")
    used = _names(function.__code__)
    missing = sorted(set(names) - used)
    if missing:
        raise TypeError(
            f"{function.__module__}.{function.__qualname__} does not use {', '.join(missing)}: "
            "this is another version than the one that is known here"
        )
    made = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__doc__ = function.__doc__
    return made


def _names(code: CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))
