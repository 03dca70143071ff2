"""Whether functions of the user's can be called as they will be: found before anything begins, not hours later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from orchestrator.callbacks.base import Callback, overrides
from orchestrator.errors import ConfigurationError
from orchestrator.warning import warn

__all__ = ["check_call", "check_callback", "check_hook", "is_ours"]

_ARGUMENTS = {
    name: tuple(inspect.signature(method).parameters)
    for name, method in vars(Callback).items()
    if name.startswith("on_")
}
"""The six methods of a callback, and what they are called with, `self` first."""

_VALIDATED = "on_epoch_end(epoch, metrics), whose metrics have what validation found"
_ELSEWHERE = {
    # Of Keras, Lightning and the Hugging Face Trainer.
    "on_fit_start": "on_train_begin()",
    "on_fit_end": "on_train_end(metrics)",
    "on_train_start": "on_train_begin()",
    "on_epoch_start": "on_epoch_begin(epoch)",
    "on_train_epoch_start": "on_epoch_begin(epoch)",
    "on_train_epoch_end": "on_epoch_end(epoch, metrics)",
    "on_batch_start": "on_batch_begin(batch)",
    "on_step_begin": "on_batch_begin(batch)",
    "on_train_batch_begin": "on_batch_begin(batch)",
    "on_train_batch_start": "on_batch_begin(batch)",
    "on_step_end": "on_batch_end(batch, metrics)",
    "on_train_batch_end": "on_batch_end(batch, metrics)",
    "on_before_zero_grad": 'trainer.before("backward")',
    "on_before_backward": 'trainer.before("backward")',
    "on_after_backward": 'trainer.after("backward")',
    "on_before_optimizer_step": 'trainer.before("step")',
    "on_pre_optimizer_step": 'trainer.before("step")',
    "on_optimizer_step": 'trainer.after("step")',
    "on_evaluate": _VALIDATED,
    "on_test_begin": _VALIDATED,
    "on_test_end": _VALIDATED,
    "on_validation_start": _VALIDATED,
    "on_validation_end": _VALIDATED,
    "on_validation_epoch_start": _VALIDATED,
    "on_validation_epoch_end": _VALIDATED,
    "on_exception": 'trainer.on("HALTED")',
    "on_save_checkpoint": "state_dict()",
    "on_load_checkpoint": "load_state_dict(state)",
}
"""Hooks of other libraries, which would never be called here, and what is here in their place."""


def check_call(what: str, function: Callable[..., Any], *expected: str) -> None:
    """Raise ConfigurationError if `function` cannot be called with as many positional arguments as are `expected`.

    What does not say what it takes (builtins, compiled and scripted functions, modules) is let through.
    """
    if error := _misfit(function, expected):
        raise ConfigurationError(
            f"{what} takes {_parameters(function)}; expected ({', '.join(expected)}), which it is called with: {error}"
        )


def check_hook(hook: Any) -> None:
    """Raise ConfigurationError unless `hook` is a function that can be called without arguments."""
    if not callable(hook):
        raise ConfigurationError(f"a hook is {hook!r}; expected a function that takes no argument")
    if _misfit(hook, ()):
        name = getattr(hook, "__qualname__", repr(hook))
        raise ConfigurationError(
            f"the hook {name} takes {_parameters(hook)}; expected a function that takes no argument: "
            "it belongs to the one trainer that it is added to, and can use that"
        )


def check_callback(callback: Callback) -> None:
    """Raise ConfigurationError where a method of `callback` would never be called, or not with what it takes.

    Warns of one that may be meant as a hook; not where the callback itself makes use of it.
    """
    kind = type(callback).__name__
    for name, arguments in _ARGUMENTS.items():
        method = getattr(callback, name)
        if overrides(callback, name) and _misfit(method, arguments[1:]):
            raise ConfigurationError(
                f"{kind}.{name} takes {_parameters(method)} beside self, and would fail when it is called; "
                f"expected def {name}({', '.join(arguments)})"
            )
    for name in _never_called(type(callback)):
        if name in _ELSEWHERE:
            raise ConfigurationError(
                f"{kind}.{name} is a hook of other trainers and would never be called; expected {_ELSEWHERE[name]}, "
                "or another name for a method that you call yourself"
            )
        warn(
            f"{kind}.{name} is no hook, and is not called; expected one of {', '.join(_ARGUMENTS)}, "
            "or a hook on another transition by trainer.before, trainer.after or trainer.on"
        )


def _never_called(kind: type[Callback]) -> Iterator[str]:
    """The methods that are named like hooks, are none, and are mentioned by no other method of the user's classes."""
    written = [base for base in kind.__mro__ if base not in Callback.__mro__ and not is_ours(base)]
    methods = {
        name: value
        for base in written
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
    }
    mentioned = {name for method in methods.values() for name in method.__code__.co_names}
    for name in methods:
        if name.startswith("on_") and name not in _ARGUMENTS and name not in mentioned:
            yield name


def is_ours(kind: type) -> bool:
    """Whether a class is one of this package."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _misfit(function: Callable[..., Any], arguments: tuple[str, ...]) -> TypeError | None:
    """Why `function` cannot be called with so many arguments by position; None where it can, or does not tell."""
    try:
        signature = _signature(function)
    except (ValueError, TypeError):  # some that are written in C
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return error
    return None


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, follow_wrapped=False)  # the wrapper is what is called


def _parameters(function: Callable[..., Any]) -> str:
    return str(_signature(function).replace(return_annotation=inspect.Signature.empty))
