"""When to deliver again: so seldom that it takes a small part of a processor."""

import time
from collections.abc import Callable

__all__ = ["Thrift"]

_SHARE = 0.0025  # of one processor
_LONGEST_S = 10.0


class Thrift:
    """Says when the next delivery of a training that goes on is due.

    Most of what one takes is the same for few points and many, so what is saved is taking them seldom: the pause after
    each is so long that its processor time is a 400th of it, but 10 s at most, since somebody may be watching.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.process_time,
    ):
        self._clock, self._spent = clock, spent
        self._before, self._next = spent(), 0.0

    @property
    def due(self) -> bool:
        """Is it time?"""
        return self._clock() >= self._next

    def rest(self) -> None:
        """What there was is delivered; the pause begins."""
        spent = self._spent()
        self._next = self._clock() + min(_LONGEST_S, (spent - self._before) / _SHARE)
        self._before = spent
