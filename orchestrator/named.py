"""States and triggers, where a user may name them."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from orchestrator.errors import ConfigurationError

__all__ = ["named"]

KindT = TypeVar("KindT", bound=Enum)


def named(kind: type[KindT], given: KindT | str, argument: str) -> KindT:
    """The member of `kind` that `given` is, or is the name of.

    Raises ConfigurationError, which says what `argument` may be, for anything else.
    """
    try:
        return kind(given)
    except ValueError:
        names = ", ".join(repr(member.value) for member in kind)
        raise ConfigurationError(
            f"{argument} is {given!r}; expected a {kind.__name__}, or the name of one: {names}"
        ) from None
