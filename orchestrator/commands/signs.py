"""What the doctor says: a sign for each thing that was looked at; and the order in which signs matter."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Sign", "bad", "fine", "note"]


@dataclass(frozen=True)
class Sign:
    """One thing that was looked at: what was found; where it is not as it should be, what was expected, what to do.

    `severity` is "fine", "note" (worth knowing, no reason to fail) or "wrong".
    """

    part: str
    severity: Literal["fine", "note", "wrong"]
    found: str
    expected: str = ""
    do: str = ""


def fine(part: str, found: str) -> Sign:
    """All is as it should be."""
    return Sign(part, "fine", found)


def note(part: str, found: str, expected: str, do: str) -> Sign:
    """Worth knowing."""
    return Sign(part, "note", found, expected, do)


def bad(part: str, found: str, expected: str, do: str) -> Sign:
    """Something is wrong."""
    return Sign(part, "wrong", found, expected, do)
