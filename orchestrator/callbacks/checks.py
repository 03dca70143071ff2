"""Checks of the numbers that users give as arguments."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.errors import ConfigurationError

__all__ = ["check_positive", "check_whole"]


def check_whole(name: str, value: Any, *, least: int = 1, unit: str = "", optional: bool = False) -> None:
    """Raise ConfigurationError unless `value` is an int of at least `least` (True is none), or None if `optional`.

    `unit` is what is counted, for the message.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = f"at least {least} {unit}".rstrip()
        raise ConfigurationError(
            f"{name} is {value!r}; expected a whole number, {expected}{_or_none(optional)}"
        )


def check_positive(name: str, value: Any, *, unit: str = "", optional: bool = False) -> None:
    """Raise ConfigurationError unless `value` is an int or float above 0 and finite, or None if `optional`.

    `unit` is what is measured, for the message.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{name} is {value!r}; expected a positive, finite number{unit and f' of {unit}'}{_or_none(optional)}"
        )


def _or_none(optional: bool) -> str:
    return ", or None for none" if optional else ""
