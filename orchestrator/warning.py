"""Warnings that point at the line of the user's script that led to them."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

_NOT_THE_USERS = {
    "orchestrator",
    "states",
    "tracking",
    "click",
    "contextlib",
    "functools",
    "multiprocessing",
    "threading",
    "torch",
    "transitions",
}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn`, said of the nearest line outside this package and what calls it: the user's hook, or `fit`.

    How many frames lie between depends on the road taken (`fit`, `advance`, a hook, a replay), so none is counted
    beforehand. In a thread of our own there is no such line: then it is the caller's.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=2 if frame is None else level)
