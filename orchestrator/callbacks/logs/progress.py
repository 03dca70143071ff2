"""Progress: how far a training is at one moment, and the one line that shows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.text import Text

from orchestrator.callbacks.logs.record import clock, quantity

__all__ = ["Pace", "Progress", "batches_left", "paint"]

_NARROWEST_BAR, _WIDEST_BAR = 6, 24
_SHARE_OF_BAR = 6
"""The bar takes a sixth of the line, whatever stands beside it: a bar that changes its width flickers."""
_AT_MOST_METRICS = 5


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
    rate: float | None = None
    """Batches a second."""
    metrics: Mapping[str, float] = field(default_factory=dict)


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


def paint(progress: Progress, width: int, ascii_only: bool = False) -> Text:
    """One line of at most `width` columns; what does not fit is left out, the least important first."""
    pieces: dict[str, Text] = {"epoch": _count("epoch", progress.epoch, progress.epochs)}
    pieces["count"] = _count("batch", progress.batches, progress.batches_per_epoch)
    if progress.doing:
        pieces["doing"] = Text(progress.doing, style="yellow")
    room = width - sum(piece.cell_len + 2 for piece in pieces.values()) + 2
    bar = min(max(width // _SHARE_OF_BAR, _NARROWEST_BAR), _WIDEST_BAR)
    if progress.batches_per_epoch and bar + 2 <= room:
        pieces["bar"] = _bar(progress.batches / progress.batches_per_epoch, bar, ascii_only)
        room -= bar + 2
    for name, piece in _optional(progress).items():
        if piece.cell_len + 2 > room:
            break
        pieces[name] = piece
        room -= piece.cell_len + 2
    front = [pieces.pop(name) for name in ("epoch", "bar", "count", "left", "doing") if name in pieces]
    line = Text("  ").join([*front, *pieces.values()])
    line.truncate(width)
    return line


def _optional(progress: Progress) -> dict[str, Text]:
    """What is shown while there is room, the most important first."""
    found: dict[str, Text] = {}
    if progress.seconds_left is not None:
        found["left"] = Text.assemble(("eta ", "dim"), clock(progress.seconds_left))
    for name, value in list(progress.metrics.items())[:_AT_MOST_METRICS]:
        found[f"metric {name}"] = Text.assemble((f"{name} ", "dim"), quantity(name, value))
    if progress.rate is not None:
        found["rate"] = Text(f"{progress.rate:.3g} batches/s", style="dim")
    return found


def _count(what: str, number: int, total: int | None) -> Text:
    if total is None:
        return Text.assemble((f"{what} ", "dim"), str(number))
    return Text.assemble((f"{what} ", "dim"), f"{number:>{len(str(total))}}/{total}")


def _bar(share: float, width: int, ascii_only: bool) -> Text:
    done = min(width, int(share * width + 1e-9))
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    return Text.assemble((full * done, "cyan"), (empty * (width - done), "bright_black"))
