"""One road to a server, with its own outages: when to try again, and few words about it."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tracking.delivery import Unavailable

__all__ = ["Line"]

_T = TypeVar("_T")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0


class Line:
    """Calls work that may find the server away, and then leaves it alone for a while, longer each time.

    Pauses double from 0.5 s to 60 s, each shortened at random by up to a half, so that many shippers do not
    come back to a server at the same moment. An outage gives one warning; of many outages only the first, second,
    fourth, eighth and so on are told of.
    """

    def __init__(
        self,
        what: str,
        notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ):
        self.down_since: float | None = None
        """When the outage that goes on now was noticed, by `clock`; None: there is none."""
        self._what, self._notice, self._clock, self._chance = what, notice, clock, chance
        self._failures = self._outages = 0
        self._next = 0.0
        self.trouble = ""
        """What is wrong now, in words; '' if nothing is."""

    @property
    def down(self) -> bool:
        """Is there an outage now?"""
        return self.down_since is not None

    @property
    def pause_s(self) -> float:
        """Seconds until the next try; 0 if there is no reason to wait."""
        return max(0.0, self._next - self._clock())

    def call(self, work: Callable[[_T], bool], argument: _T) -> bool:
        """What `work(argument)` answers; False when it is Unavailable, and, without calling it, during a pause."""
        if self.pause_s:
            return False
        try:
            answer = work(argument)
        except Unavailable as error:
            self._failed(error)
            return False
        if self.down_since is not None and self._told:
            self._notice(f"{self._what}: works again after {self._clock() - self.down_since:.0f} s")
        self.down_since, self._failures, self._next, self.trouble = None, 0, 0.0, ""
        return answer

    def hurry(self) -> None:
        """Try again now, and soon after: something has changed."""
        self._failures, self._next = 0, 0.0

    @property
    def _told(self) -> bool:
        return self._outages & (self._outages - 1) == 0

    def _failed(self, error: Unavailable) -> None:
        if self.down_since is None:
            self.down_since = self._clock()
            self._outages += 1
            if self._told:
                number = f" (outage {self._outages}; the next that is told is {2 * self._outages})"
                self._notice(
                    f"{self._what}: {error}; trying again until it works{number if self._outages > 2 else ''}"
                )
        self.trouble = f"{self._what}: {error}"
        pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self._next = self._clock() + pause * (1 - self._chance() / 2)
