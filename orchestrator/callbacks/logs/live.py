"""Live: what is drawn on a terminal, in colours: rows, and below them one line that shows the progress.

Imported where somebody looks on: no other training needs rich.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.text import Text

from orchestrator.callbacks.logs.progress import Progress
from orchestrator.callbacks.logs.record import Kind, LogRecord, clock, is_own, label, quantity
from orchestrator.callbacks.logs.table import EpochTable
from orchestrator.callbacks.logs.terminal import Terminal

__all__ = ["LiveConsole", "paint"]

_STYLES: Mapping[Kind, str] = {
    "start": "bold",
    "resume": "bold",
    "epoch": "cyan",
    "message": "",
    "warning": "yellow",
    "halt": "bold red",
    "done": "bold green",
    "batch": "dim",
    "transition": "dim",
}

_NARROWEST_BAR, _WIDEST_BAR = 6, 24
_SHARE_OF_BAR = 6
"""The bar takes a sixth of the line, whatever stands beside it: a bar that changes its width flickers."""
_AT_MOST_METRICS = 5
_AT_MOST_SHARES = 3


class LiveConsole:
    """Records as rows, and below them one line that shows the progress, drawn at most ten times a second.

    A thread keeps the line going while the loop is busy with one thing for long (`progress` is called from
    it, and must only look). It draws only where the line is on show: what somebody else has written, a
    debugger's prompt for instance, is left alone until the next batch.
    """

    INTERVAL = 0.1
    IDLE = 0.5

    def __init__(self, progress: Callable[[], Progress], *streams: TextIO) -> None:
        self._console = Console(file=streams[0], force_terminal=True, highlight=False, soft_wrap=True)
        self._stream = streams[0]
        self._ascii_only = not (streams[0].encoding or "").lower().startswith("utf")
        self._progress = progress
        self.terminal = Terminal(*streams)
        self._next = 0.0
        self._drawn = 0.0
        self._last = ""
        self._table = EpochTable()
        self._closing = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="interlock-progress", daemon=True)
        self._ticker.start()

    @property
    def due(self) -> bool:
        """Whether the line is due to be drawn."""
        return time.monotonic() >= self._next

    def draw(self) -> None:
        """Draw the line now."""
        self._drawn = time.monotonic()
        self._next = self._drawn + self.INTERVAL
        line = paint(self._progress(), self._width, self._ascii_only)
        self._show(self._rendered(line))

    @property
    def _width(self) -> int:
        """The columns of the terminal but one: terminals wrap when the last one is written."""
        # rich asks the process's own descriptors, which need not be this terminal.
        try:
            return max(1, os.get_terminal_size(self._stream.fileno()).columns - 1)
        except (OSError, ValueError):
            return 79

    def _show(self, line: str) -> None:
        self._last = line
        try:
            self.terminal.show(line)
        except (OSError, ValueError):
            self._closing.set()
            self._next = float("inf")

    def _tick(self) -> None:
        while not self._closing.wait(self.IDLE):
            if self.terminal.shown and time.monotonic() - self._drawn >= self.IDLE:
                self.draw()

    def write(self, record: LogRecord) -> None:
        """Print the record above the line; that of an epoch as a row of a table, where it fits."""
        shown = self.terminal.shown
        try:
            rows = self._table.rows(record, self._width) if record.kind == "epoch" else []
            for text in rows or [styled(record, self._width)]:
                self.terminal.print(self._rendered(text))
            if shown and record.kind not in ("done", "halt"):
                self.terminal.show(self._last)
        except (OSError, ValueError):
            self._closing.set()

    def _rendered(self, text: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(text, end="")
        return captured.get()

    def close(self) -> None:
        """Take the line away."""
        self._closing.set()
        try:
            self.terminal.close()
        except (OSError, ValueError):
            pass
        if self._ticker is not threading.current_thread():
            self._ticker.join()


def styled(record: LogRecord, width: int) -> Text:
    """The record's text in colours.

    In a row longer than `width`, what interlock adds to the measured values is left out as need be.
    """
    first, *further = record.message.split("\n")
    text = Text.assemble((first, _STYLES[record.kind]))
    values = record.values
    needed = sum(_cells(name, value) for name, value in values if not is_own(name))
    room = width - text.cell_len - needed
    for name, value in values:
        if is_own(name):
            room -= _cells(name, value)
            if room < 0:
                break
        text.append("  " + label(name), style="dim")
        text.append(value)
    text.rstrip()
    for line in further:
        text.append("\n" + line)
    return text


def _cells(name: str, value: str) -> int:
    return 2 + len(label(name)) + len(value)


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
    for name, share in progress.main_shares[:_AT_MOST_SHARES]:
        found[f"share {name}"] = Text.assemble((f"{name} ", "dim"), f"{share:.0%}")
    if progress.state and not progress.doing:
        found["state"] = Text(progress.state, style="dim")
    return found


def _count(what: str, number: int, total: int | None) -> Text:
    if total is None:
        return Text.assemble((f"{what} ", "dim"), str(number))
    return Text.assemble((f"{what} ", "dim"), f"{number:>{len(str(total))}}/{total}")


def _bar(share: float, width: int, ascii_only: bool) -> Text:
    done = min(width, int(share * width + 1e-9))
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    return Text.assemble((full * done, "cyan"), (empty * (width - done), "bright_black"))
