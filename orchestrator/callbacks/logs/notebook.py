"""Notebook: what a training says below a cell, as one output that is renewed: what was said, a table, the progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from html import escape
from importlib import import_module
from typing import Any

from orchestrator.callbacks.logs.progress import Progress
from orchestrator.callbacks.logs.record import LogRecord, clock, head, quantity

__all__ = ["NotebookConsole", "in_notebook"]

_MOST_ROWS, _MOST_LINES = 50, 100
"""Of the table, and of what was said before and after it: the newest. Everything is in `console.log`."""
_CELL = "text-align:right;padding:0 .6em;font-variant-numeric:tabular-nums"


def in_notebook() -> bool:
    """Whether output goes below a notebook's cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class NotebookConsole:
    """Takes log records as `LiveConsole` does; draws at most four times a second, from the loop or a thread."""

    INTERVAL = 0.25
    IDLE = 0.5

    def __init__(self, progress: Callable[[], Progress]) -> None:
        display = import_module("IPython.display").display
        self._progress = progress
        self._above: list[str] = []
        self._below: list[str] = []
        self._rows: list[dict[str, str]] = []
        self._earlier = 0
        self._next = self._drawn = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._output: Any = display(self._contents(None), raw=True, display_id=True)
        self._ticker = threading.Thread(target=self._tick, name="interlock-progress", daemon=True)
        self._ticker.start()

    @property
    def due(self) -> bool:
        """Whether the output is due to be drawn."""
        return time.monotonic() >= self._next

    def draw(self) -> None:
        """Draw everything now, with the progress."""
        self._show(self._progress())

    def write(self, record: LogRecord) -> None:
        """Show the record: a row of the table for an epoch, lines for all else."""
        with self._lock:
            if record.kind == "epoch":
                self._rows.append({head(name): value for name, value in record.cells.items()})
                if len(self._rows) > _MOST_ROWS:
                    del self._rows[0]
                    self._earlier += 1
            elif record.kind != "warning":  # which Python shows by itself
                said = self._below if self._rows else self._above
                said += record.text.split("\n")
                del said[:-_MOST_LINES]
        ended = record.kind in ("done", "halt")
        self._show(None if ended else self._progress())

    def close(self) -> None:
        """Take the progress away."""
        self._closing.set()
        if self._ticker is not threading.current_thread():
            self._ticker.join()
        self._show(None)

    def _tick(self) -> None:
        while not self._closing.wait(self.IDLE):
            if time.monotonic() - self._drawn >= self.IDLE:
                self.draw()

    def _show(self, progress: Progress | None) -> None:
        with self._lock:
            self._drawn = time.monotonic()
            self._next = self._drawn + self.INTERVAL
            self._output.update(self._contents(progress), raw=True)

    def _contents(self, progress: Progress | None) -> dict[str, str]:
        plain = [*self._above, *(f"... {self._earlier} epochs before" for _ in range(self._earlier > 0))]
        plain += ["  ".join(f"{name} {row[name]}" for name in row) for row in self._rows]
        plain += self._below
        html = [_lines(self._above), _table(self._rows, self._earlier), _lines(self._below)]
        if progress is not None:
            words = _words(progress)
            plain.append(words)
            html.append(_bar(progress) + escape(words).replace("  ", "&ensp;"))
        return {"text/html": "\n".join(filter(None, html)), "text/plain": "\n".join(plain)}


def _lines(said: list[str]) -> str:
    return f"<pre style='margin:0;padding:0'>{escape(chr(10).join(said))}</pre>" if said else ""


def _table(rows: list[dict[str, str]], earlier: int) -> str:
    if not rows:
        return ""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"<tr>{''.join(f'<th style={_CELL!r}>{escape(head)}</th>' for head in heads)}</tr>"]
    if earlier:
        lines.append(f"<tr><td style='{_CELL}' colspan={len(heads)}>{earlier} epochs before</td></tr>")
    for row in rows:
        cells = (f"<td style={_CELL!r}>{escape(row.get(head, ''))}</td>" for head in heads)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table style='margin:.3em 0'>" + "".join(lines) + "</table>"


def _bar(progress: Progress) -> str:
    if not progress.batches_per_epoch:
        return ""
    return (
        f"<progress value={progress.batches} max={progress.batches_per_epoch} style='width:12em'></progress> "
    )


def _words(progress: Progress) -> str:
    of_epochs = "" if progress.epochs is None else f"/{progress.epochs}"
    of_batches = "" if progress.batches_per_epoch is None else f"/{progress.batches_per_epoch}"
    pieces = [f"epoch {progress.epoch}{of_epochs}", f"batch {progress.batches}{of_batches}", progress.doing]
    if progress.seconds_left is not None:
        pieces.append(f"eta {clock(progress.seconds_left)}")
    pieces += [f"{name} {quantity(name, value)}" for name, value in progress.metrics.items()]
    if progress.rate is not None:
        pieces.append(f"{progress.rate:.3g} batches/s")
    pieces += [f"{name} {share:.0%}" for name, share in progress.main_shares]
    pieces.append("" if progress.doing else progress.state)
    return "  ".join(filter(None, pieces))
