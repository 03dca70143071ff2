"""How often to save, so that saving costs no more than a given share of the training: what is measured, what follows.

After CheckFreq (Mohan, Phanishayee, Chidambaram, FAST '21): the cost of a save and the time of a batch are measured
while the training runs, and the interval follows them as they change. Nothing here knows what is trained or saved.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Costs", "Measured", "Rhythm", "Saving", "save_interval"]

_DISK_SHARE = 0.25
"""The most of the time that may be spent writing: a disk wears, and other work wants it too."""

_PACE_S = 1.0
"""Saves are this far apart at least, because each leaves a row in the journal..."""

_AGE_SHARE = 0.05
"""...or, in a young attempt, this share of its age: one that is killed every few seconds must get on."""

_FEW = 5
"""So many batches say how long one takes."""

_TRIALS = 3
"""So many saves say what one costs; a single one may have met anything."""

_LOOK_EVERY = 16
"""Batches after which the interval is worked out anew."""

_OUTLIER = 10.0
"""Times the median; what takes longer is counted as that: a data worker that starts, a laptop that slept."""


@dataclass(frozen=True)
class Costs:
    """What a save and a batch cost, in seconds."""

    stall_s: float
    """The training stands still for a save."""
    slowed_s: float
    """The batches under way while it is being written take longer by this, all together."""
    write_s: float
    """From then on until it is durable, as far as that is longer than a batch."""
    step_s: float
    """A batch while nothing is being written."""


def save_interval(costs: Costs, overhead: float, age_s: float = math.inf) -> int:
    """The fewest batches from one save to the next that keep three bounds.

    What a save costs is at most `overhead` of the time between two; a quarter of that time is enough to write it; saves
    are a second apart, or a twentieth of `age_s`, the age of the attempt.
    """
    least = max(
        (costs.stall_s + costs.slowed_s) / overhead,
        costs.write_s / _DISK_SHARE,
        min(_PACE_S, age_s * _AGE_SHARE),
    )
    return max(math.ceil(min(least / costs.step_s, sys.maxsize)), 1)


class Measured:
    """The newest measurements, those of earlier attempts included."""

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        """With what `state_dict` gave in an earlier attempt, if anything."""
        self._earlier_step: float | None = None if earlier is None else earlier["step_s"]
        saves = () if earlier is None else earlier["saves"]
        self._steps: deque[float] = deque(maxlen=64)
        self._saves: deque[tuple[float, float, float]] = deque(map(tuple, saves), maxlen=5)
        self._own = 0

    def state_dict(self) -> dict[str, Any] | None:
        """What the next attempt begins with; None where nothing was measured."""
        step_s, saves = self.step_s, list(self._saves)
        return {"step_s": step_s, "saves": saves} if saves or step_s is not None else None

    def step(self, seconds: float) -> None:
        """A batch took so long while nothing was being written."""
        self._steps.append(seconds)

    def save(self, stall_s: float, write_s: float, batches: Sequence[float]) -> None:
        """A save stalled the training, and was being written while these batches were computed."""
        step_s = self.step_s
        if step_s is None:
            return
        if (
            self._own == 1
        ):  # the first of an attempt allocates its memory: it counts only while it is the newest
            self._saves.pop()
        self._own += 1
        self._saves.append((stall_s, sum(batches) - len(batches) * step_s, write_s))

    @property
    def step_s(self) -> float | None:
        """Seconds of a batch while nothing is being written; None where too little was seen."""
        if len(self._steps) < _FEW:
            return self._earlier_step
        ordered = sorted(self._steps)
        most = ordered[len(ordered) // 2] * _OUTLIER
        return sum(min(seconds, most) for seconds in ordered) / len(ordered)

    @property
    def costs(self) -> Costs | None:
        """What is known; None before enough saves were measured."""
        step_s = self.step_s
        if step_s is None or len(self._saves) < _TRIALS:
            return None
        stall_s, slowed_s, write_s = map(statistics.median, zip(*self._saves, strict=True))
        return Costs(stall_s, max(slowed_s, 0.0), write_s, step_s)

    @property
    def trial(self) -> Costs | None:
        """What bounds the saves that are there to be measured: all but their cost. None where a batch is not known."""
        step_s = self.step_s
        return None if step_s is None else Costs(0.0, 0.0, self._saves[-1][2] if self._saves else 0.0, step_s)


class Saving(Protocol):
    """A save that was asked for."""

    @property
    def stall_s(self) -> float | None:
        """Seconds that the training stood still for it; None before it began."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it: it is durable, or failed."""


@dataclass
class _Writing:
    """A save under way, and the batches computed meanwhile."""

    save: Saving
    asked: float
    seen: float
    """When it was last seen under way."""
    batches: list[float] = field(default_factory=list)
    stalled: bool = False


class Rhythm:
    """Told what happens in an attempt, it says when a save is due. `clock` gives seconds.

    No save is due while one is being written, so none waits for another. The first few of a run are there to be
    measured.
    """

    def __init__(self, overhead: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.overhead = overhead
        self._clock = clock
        self.measured = Measured()
        self.begin()

    def begin(self) -> None:
        """An attempt begins."""
        self._began = self._clock()
        self._mark: float | None = None
        self._writing: _Writing | None = None
        self._since = 0
        self._interval: int | None = None
        self._told: int | None = None
        self._news: str | None = None

    def know(self, measured: Measured) -> None:
        """What an earlier attempt has found."""
        self.measured = measured
        self._interval = None

    def saved(self, save: Saving) -> None:
        """A save was asked for."""
        now = self._clock()
        self._writing = _Writing(save, now, now)
        self._since = 0

    def rests(self) -> None:
        """What comes now belongs to no batch."""
        self._mark = None

    def goes_on(self) -> None:
        """The next batch begins, or what was asked for before it."""
        self._mark = self._clock()

    def computed(self) -> None:
        """A batch has been computed."""
        self._since += 1
        self._look()
        if self._interval is None or self._since % _LOOK_EVERY == 0:
            self._decide()

    def _look(self) -> None:
        now, mark, writing = self._clock(), self._mark, self._writing
        if writing is None:
            if mark is not None:
                self.measured.step(now - mark)
            return
        stall_s = writing.save.stall_s
        if stall_s is not None:
            stalled = 0.0 if writing.stalled else stall_s
            writing.stalled = True
            if mark is not None:
                writing.batches.append(max(now - mark - stalled, 0.0))
        if not writing.save.ended:
            writing.seen = now
            return
        self._writing = None
        if stall_s is not None:
            write_s = max(writing.seen - writing.asked - stall_s, 0.0)
            self.measured.save(stall_s, write_s, writing.batches)
        self._decide()

    def _decide(self) -> None:
        costs = self.measured.costs
        bounds = costs or self.measured.trial
        if bounds is None:
            return
        self._interval = save_interval(bounds, self.overhead, self._clock() - self._began)
        if costs is None:
            return
        settled = save_interval(costs, self.overhead)
        if self._told is None or settled >= 2 * self._told or self._told >= 2 * settled:
            self._told, self._news = settled, _in_words(settled, costs)

    @property
    def due(self) -> bool:
        """Whether a save is due at this batch."""
        return self._writing is None and self._interval is not None and self._since >= self._interval

    def news(self) -> str | None:
        """What is to be said of the interval: once when it is known, and when it is half or twice what was said."""
        news, self._news = self._news, None
        return news


def _in_words(interval: int, costs: Costs) -> str:
    share = (costs.stall_s + costs.slowed_s) / (interval * costs.step_s)
    batches = "batch" if interval == 1 else f"{interval:,} batches"
    written = f"is written in {_span(costs.write_s)}" if costs.write_s else "is written within a batch"
    return (
        f"a checkpoint every {batches} ({_span(interval * costs.step_s)}) costs {share:.1%} of the time: it stalls the "
        f"training for {_span(costs.stall_s)}, slows it by {_span(costs.slowed_s)} and {written}; "
        f"a batch takes {_span(costs.step_s)}"
    )


def _span(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
