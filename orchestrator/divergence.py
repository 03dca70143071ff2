"""Divergence: does what is done again give what it gave? Losses compared bit for bit with those of the journal."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from states.errors import InterlockError
from states.table import State
from tracking.rows import Loss

__all__ = ["Divergence", "DivergenceError", "Expected", "same_bits"]


class DivergenceError(InterlockError):
    """What was done again came out otherwise than the first time, and `on_divergence="halt"` was asked for.

    `divergence` says where, and has both values.
    """

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        super().__init__(str(divergence))


@dataclass(frozen=True)
class Divergence:
    """The first loss that was not what it was before: its `epoch`, `batch`, `phase` and `state`, and both values."""

    epoch: int
    batch: int
    phase: str
    state: State
    recorded: float
    """The loss of the first time."""
    found: float
    """That of now."""
    reasons: tuple[str, ...] = ()
    """What is known to be different now, such as another version of torch."""

    def __str__(self) -> str:
        phase = f", phase {self.phase!r}" if self.phase else ""
        known = f" What differs now: {'; '.join(self.reasons)}." if self.reasons else ""
        return (
            f"epoch {self.epoch}, batch {self.batch}{phase} ({self.state.value}), done again, has a loss of "
            f"{self.found!r}; recorded was {self.recorded!r}, and expected the same, bit for bit.{known} From here on "
            "this is another training than the recorded one. Look for what is neither seeded nor in a checkpoint, "
            "or try deterministic=True"
        )


def same_bits(one: float, other: float) -> bool:
    """Whether two losses are the same number; 0.0 is not -0.0, and any NaN is a NaN."""
    return struct.pack("<d", one) == struct.pack("<d", other) or (one != one and other != other)


class Expected:
    """The losses that a stretch of training should meet again, in their order; up to the first that differs.

    `losses` are taken as they are met: there may be millions.
    """

    def __init__(self, losses: Iterable[Loss], reasons: Iterable[str] = ()) -> None:
        self._losses = iter(losses)
        self._next = next(self._losses, None)
        self._reasons = tuple(reasons)

    def meet(self, epoch: int, batch: int, phase: str, loss: float) -> Divergence | None:
        """Compare the loss of this place with the recorded one, if there is one."""
        place = (epoch, batch)
        while (recorded := self._next) is not None:
            if (recorded.epoch, recorded.batch) > place:
                return None
            self._next = next(self._losses, None)
            if (recorded.epoch, recorded.batch, recorded.phase) != (epoch, batch, phase):
                continue
            if recorded.loss is None or same_bits(recorded.loss, loss):
                return None
            self._next = None
            return Divergence(epoch, batch, phase, State.FORWARD, recorded.loss, loss, self._reasons)
        return None
