"""Whether functions of the user's can be called as they will be: found before anything begins, not hours later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from orchestrator.callbacks.base import Callback, overrides
from orchestrator.errors import ConfigurationError
from orchestrator.warning import warn

__all__ = ["check_call", "check_hooks"]

_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_call(what: str, function: Callable[..., Any], *expected: str) -> None:
    """Raise ConfigurationError if `function` cannot be called with as many positional arguments as are `expected`.

    What does not say what it takes (builtins, compiled and scripted functions, modules) is let through.
    """
    try:
        # What a decorator wraps may take something else than the decorated function.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*expected)
    except TypeError as error:
        raise ConfigurationError(
            f"{what} takes {signature}; expected ({', '.join(expected)}), which it is called with: {error}"
        ) from None


def check_hooks(callback: Callback) -> None:
    """Raise ConfigurationError for a hook with other arguments than it gets; warn of one that is never called."""
    kind = type(callback)
    for hook in _HOOKS:
        if overrides(callback, hook):
            expected = list(inspect.signature(getattr(Callback, hook)).parameters)[1:]
            check_call(f"{kind.__name__}.{hook}", getattr(callback, hook), *expected)
    if kind.__module__.startswith("orchestrator."):
        return
    own = [vars(base) for base in kind.__mro__ if issubclass(base, Callback) and base is not Callback]
    used = {
        name for of in own for value in of.values() for name in getattr(value, "__code__", _NONE).co_names
    }
    for name in dict.fromkeys(name for of in own for name, value in of.items() if inspect.isfunction(value)):
        if name.startswith("on_") and name not in _HOOKS and name not in used:
            warn(
                f"{kind.__name__}.{name} is no hook, and is not called; expected one of {', '.join(_HOOKS)}, "
                "or a hook on another transition by trainer.before, trainer.after or trainer.on"
            )


_NONE = (lambda: None).__code__
