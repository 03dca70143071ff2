"""Thinning: how many batches make one point of `batch/*`, and the means that are being made of them."""

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Pace", "Window", "Windows"]

_HORIZON_S = 20.0
_CATCH_UP_S = 600.0
_MOST_A_SECOND = 2000.0
_STEADY_A_SECOND = 25.0
_MEANS_A_SECOND = 8.0
_FIRST = 10_000
_FEWEST_A_SECOND = 10.0
_LARGEST = 2**20
_NEARLY = 0.99  # a rate is measured in whole values
_TELLING = 200  # points: sendings of fewer say more about the way to the server than about the server


class Window(NamedTuple):
    """Values of one metric that will be one point: their mean, at the last one's step and time."""

    step: int
    time_ms: int
    total: float
    number: int

    @property
    def mean(self) -> float:
        """A single value is itself, bit for bit."""
        return self.total / self.number


class Windows:
    """The open windows of all metrics, by name, while values go through; a window ends at a multiple of `every`.

    So windows begin where those before ended, whatever `every` was then: none overlap, and each value is in one.
    """

    def __init__(self, open_ones: Mapping[str, Window], every: int):
        self.open = dict(open_ones)
        self._every = every

    def add(self, name: str, values: Sequence[tuple[int, int, float]]) -> list[tuple[str, Window]]:
        """Put values of one metric, (step, time in ms, value) by step, into windows; gives the complete ones, named."""
        if not values:
            return []
        complete = self._passed(values[0][0], name)
        if self._every == 1 and name not in self.open:
            return complete + [(name, Window(*one, 1)) for one in values]
        steps, times_ms, numbers = zip(*values, strict=True)
        at = 0
        while at < len(steps):
            before = self.open.pop(name, None) or Window(steps[at], times_ms[at], -0.0, 0)
            end = self._end(before.step)
            upto = max(at + 1, bisect_right(steps, end, at))
            window = Window(
                max(before.step, steps[upto - 1]),
                max(before.time_ms, *times_ms[at:upto]),
                sum(numbers[at:upto], before.total),
                before.number + upto - at,
            )
            if window.step == end or upto < len(steps):
                complete.append((name, window))
            else:
                self.open[name] = window
            at = upto
        return complete

    def passed(self, step: int) -> list[tuple[str, Window]]:
        """The windows that end before `step`, named: their metric is not of every batch."""
        return [complete for name in list(self.open) for complete in self._passed(step, name)]

    def _passed(self, step: int, name: str) -> list[tuple[str, Window]]:
        window = self.open.get(name)
        if window is None or self._end(window.step) >= step:
            return []
        return [(name, self.open.pop(name))]

    def _end(self, step: int) -> int:
        return -(-step // self._every) * self._every


class Pace:
    """Says how many batches make one point: the smallest power of two with which the server keeps up easily.

    That is: what a training measures in a second (on average over the last twenty seconds), and a six-hundredth of what
    waits, are then no more points than 2,000, and no more than half of what the server was seen to take in a
    second; and, once a run has measured 10,000 values, more than 25 values a second are at most 8 points a second,
    because a point costs some 0.1 ms of processor time, and charts show a few hundred. Up to there every batch is one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._taken_a_second: float | None = None

    def saw(self, values: int) -> None:
        """So many values has the training measured by now."""
        now = self._clock()
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, values))
        # One that is older stays: where a sending takes longer than that, there is no other.
        while len(self._seen) > 1 and now - self._seen[1][0] >= _HORIZON_S:
            self._seen.popleft()
        self._newest = values
        self._span_s = max(_HORIZON_S, now - self._seen[0][0])

    def took(self, points: int, seconds: float) -> None:
        """The server has taken so many points in so many seconds, all that belongs to it included."""
        if points >= _TELLING:
            rate = points / max(seconds, 1e-6)
            before = self._taken_a_second
            self._taken_a_second = rate if before is None else 0.8 * before + 0.2 * rate

    def every(self, waiting: int) -> int:
        """How many batches make one point when `waiting` values wait."""
        supply = _MOST_A_SECOND
        if self._taken_a_second is not None:
            supply = max(_FEWEST_A_SECOND, min(supply, self._taken_a_second / 2))
        rate = (self._newest - self._seen[0][1]) / self._span_s
        least = (rate + waiting / _CATCH_UP_S) / supply
        if self._newest > _FIRST and rate * _NEARLY > _STEADY_A_SECOND:
            least = max(least, rate / _MEANS_A_SECOND)
        every = 1
        while every < _NEARLY * least and every < _LARGEST:
            every *= 2
        return every
