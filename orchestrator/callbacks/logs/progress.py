"""Progress: how far a training is at one moment, and how fast it goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Pace", "Progress", "batches_left"]

_WORTH_SHOWING = 0.05


@dataclass(frozen=True)
class Progress:
    """How far a training is. Counts are of what has begun (epochs) and what is complete (batches)."""

    epoch: int
    """From 1, the epoch at hand."""
    epochs: int | None
    batches: int
    """Completed in this epoch."""
    batches_per_epoch: int | None
    doing: str = ""
    """What goes on where it is not the ordinary batch, such as "validating val 0:03"."""
    seconds_left: float | None = None
    """Of the whole training where its length is known, otherwise of the epoch; None: not known."""
    state: str = ""
    """That the machine stands in."""
    rate: float | None = None
    """Batches a second."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the time of the newest batches, by what it was spent on."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def main_shares(self) -> list[tuple[str, float]]:
        """The shares that are worth showing, the largest first."""
        found = sorted(self.shares.items(), key=lambda item: -item[1])
        return [(name, share) for name, share in found if share >= _WORTH_SHOWING]


class Pace:
    """How fast batches go by, over the last minute or so: validation and saving are part of it."""

    def __init__(self, window: int = 60) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=window)

    def mark(self, now: float, batches: int) -> None:
        """At `now` (seconds of any clock), `batches` were complete. One mark a second is kept."""
        if not self._marks or now - self._marks[-1][0] >= 1.0 or len(self._marks) == 1:
            self._marks.append((now, batches))
        self._newest = (now, batches)

    @property
    def rate(self) -> float | None:
        """Batches a second; None before anything can be said."""
        if not self._marks:
            return None
        (began, first), (now, last) = self._marks[0], self._newest
        return (last - first) / (now - began) if last > first and now > began else None


def batches_left(
    done: int,
    epoch: int,
    batch: int,
    epochs: int | None,
    batches_per_epoch: int | None,
    max_batches: int | None,
) -> int | None:
    """How many batches the training (or, where its length is not known, the epoch) still has.

    `done` of the whole run are complete, `batch` of them in the `epoch` at hand, which counts from 0.
    """
    limits = []
    if max_batches is not None:
        limits.append(max_batches - done)
    if batches_per_epoch is not None:
        further_epochs = epochs - epoch - 1 if epochs is not None else None
        if further_epochs is not None:
            limits.append(batches_per_epoch * (further_epochs + 1) - batch)
        elif max_batches is None:
            limits.append(batches_per_epoch - batch)
    return max(0, min(limits)) if limits else None
