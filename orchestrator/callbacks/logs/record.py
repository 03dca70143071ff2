"""LogRecord: one thing that a training says, and how its values are written as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

__all__ = ["Kind", "LogRecord", "clock", "head", "is_own", "label", "quantity", "shown", "span"]

Kind = Literal["start", "resume", "epoch", "batch", "transition", "message", "warning", "halt", "done"]

_LATER = ("skipped", "batch_time", "duration", "lr", "grad_norm")
"""Names that come after everything that was measured, in this order."""


@dataclass(frozen=True)
class LogRecord:
    """What is said, when, and where the training stood; `epoch` and `batch` count from 0, -1: none yet."""

    time: float
    """Seconds since 1970."""
    kind: Kind
    """What it tells of."""
    message: str
    """Without the metrics. Further lines, where there are any, begin after a newline."""
    epoch: int
    batch: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The chosen metrics, in the order in which they are shown."""

    @property
    def text(self) -> str:
        """Message and metrics, as a console without colours shows them."""
        labelled = (label(name) + value for name, value in self.values)
        return "  ".join((self.message, *labelled)).rstrip()

    @property
    def values(self) -> list[tuple[str, str]]:
        """The metrics' names and their values as text, of a width that lets rows line up."""
        return [(name, f"{quantity(name, value):<6}") for name, value in self.metrics.items()]

    @property
    def cells(self) -> dict[str, str]:
        """Of an epoch's record: its row in a table, by column."""
        return {"epoch": self.message.removeprefix("epoch ")} | {
            name: value.rstrip() for name, value in self.values
        }

    @property
    def file_line(self) -> str:
        """One line with the time in front, however many lines the message has; no newline at its end."""
        moment = datetime.fromtimestamp(self.time).astimezone().isoformat(timespec="milliseconds")
        one_line = "; ".join(filter(None, (part.strip() for part in self.text.splitlines())))
        return f"{moment}  {self.kind:<10}  {one_line}"


def label(name: str) -> str:
    """What stands in front of a metric's value; a duration is known by its unit."""
    return "" if name == "duration" else f"{name} "


def head(name: str) -> str:
    """What stands above the column of a metric, or in a table of epochs above their count."""
    return "time" if name == "duration" else name


def is_own(name: str) -> bool:
    """Whether interlock adds it to what was measured: what a narrow terminal can do without."""
    return name.split("/")[0] in _LATER


def shown(metrics: Mapping[str, float], chosen: Sequence[str] | None) -> dict[str, float]:
    """The metrics to show: the chosen ones; None chooses all but those of single parameters.

    (Those have two slashes in their names: "grad/fc.weight/norm".) Without a choice the loss comes first,
    and what interlock adds of its own comes last.
    """
    if chosen is not None:
        return {name: metrics[name] for name in chosen if name in metrics}
    names = [name for name in metrics if name.count("/") < 2]
    return {name: metrics[name] for name in sorted(names, key=_rank)}


def _rank(name: str) -> int:
    if name == "loss":
        return -1
    family = name.split("/")[0]
    return 1 + _LATER.index(family) if family in _LATER else 0


def quantity(name: str, value: float) -> str:
    """A metric's value as text, in units for those that have one: about four figures."""
    if not math.isfinite(value):
        return str(value)
    if name == "duration":
        return span(value)
    if name == "batch_time":
        return f"{value * 1e3:.3g} ms" if value < 1 else span(value)
    if name == "skipped":
        return str(int(value))
    if name == "lr" or name.startswith("lr/"):
        return f"{value:.4g}"
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.4f}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:.1f}"
    return f"{value:.4g}"


def span(seconds: float) -> str:
    """A length of time for people: "0.41 s", "12.3 s", "2 min 05 s", "3 h 07 min"."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """Time left or passed as a clock shows it: "0:07", "12:34", "3:07:12"."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"
