"""Logging: what a training says while it runs, to the console, a file and functions.

Its public names are imported when first used: commands need how progress is counted, and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.callbacks.logs.callback import Logging
    from orchestrator.callbacks.logs.record import LogRecord

__all__ = ["LogRecord", "Logging"]

_HOMES = {"Logging": "callback", "LogRecord": "record"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
