"""Checks of hooks before anything begins: that they take what they are called with, and have names that are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from orchestrator.callbacks.base import Callback, overrides
from orchestrator.errors import ConfigurationError

__all__ = ["check_callback", "check_hook"]

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "on_train_begin": (),
    "on_epoch_begin": ("epoch",),
    "on_batch_begin": ("batch",),
    "on_batch_end": ("batch", "metrics"),
    "on_epoch_end": ("epoch", "metrics"),
    "on_train_end": ("metrics",),
}
"""The six methods of a callback, and what they are called with."""

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


def check_hook(hook: Any) -> None:
    """Raise ConfigurationError unless `hook` is a function that can be called without arguments."""
    if not callable(hook):
        raise ConfigurationError(f"a hook is {hook!r}; expected a function that takes no argument")
    if not _takes(hook, ()):
        name = getattr(hook, "__qualname__", repr(hook))
        raise ConfigurationError(
            f"the hook {name} takes {_parameters(hook)}; expected a function that takes no argument: "
            "it belongs to the one trainer that it is added to, and can use that"
        )


def check_callback(callback: Callback) -> None:
    """Raise ConfigurationError where a method of `callback` would never be called, or not with what it takes."""
    kind = type(callback).__name__
    for name, here in _ELSEWHERE.items():
        if hasattr(callback, name):
            raise ConfigurationError(
                f"{kind}.{name} is a hook of other trainers and would never be called; expected {here}, or "
                "another name for a method that you call yourself"
            )
    for name, arguments in _ARGUMENTS.items():
        method = getattr(callback, name)
        if overrides(callback, name) and not _takes(method, arguments):
            expected = ", ".join(("self", *arguments))
            raise ConfigurationError(
                f"{kind}.{name} takes {_parameters(method)} beside self, and would fail when it is called; "
                f"expected def {name}({expected})"
            )


def _takes(function: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Whether `function` can be called with so many arguments by position; True where it does not tell."""
    try:
        signature = _signature(function)
    except (ValueError, TypeError):  # some that are written in C
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, follow_wrapped=False)  # the wrapper is what is called


def _parameters(function: Callable[..., Any]) -> str:
    return str(_signature(function).replace(return_annotation=inspect.Signature.empty))
