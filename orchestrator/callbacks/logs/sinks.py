"""Sinks: where log records go. A console in plain lines or with a live line, a file, a function."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from orchestrator.callbacks.logs.progress import Progress, paint
from orchestrator.callbacks.logs.record import Kind, LogRecord, is_own, label
from orchestrator.callbacks.logs.terminal import Terminal

__all__ = ["FileLog", "FunctionSink", "LiveConsole", "PlainConsole", "Sink", "live_wanted"]

_STYLES: Mapping[Kind, str] = {
    "start": "bold",
    "resume": "bold",
    "epoch": "cyan",
    "warning": "yellow",
    "halt": "bold red",
    "done": "bold green",
    "batch": "dim",
    "transition": "dim",
}


class Sink(Protocol):
    """Takes log records, in order, until it is closed."""

    def write(self, record: LogRecord) -> None:
        """Take one record."""

    def close(self) -> None:
        """No more will come."""


def live_wanted(stream: TextIO | None, environment: Mapping[str, str]) -> bool:
    """Whether a line that is drawn again and again makes sense: a capable terminal with somebody at it."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return environment.get("TERM", "") not in ("", "dumb", "unknown") and not environment.get("CI")


class PlainConsole:
    """One line of text for each record, written out at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def write(self, record: LogRecord) -> None:
        """Print the record. A reader that has gone away (`| head`) ends the printing, not the training."""
        if self._stream is None:
            return
        try:
            self._stream.write(_encodable(record.text, self._stream) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._stream = None

    def close(self) -> None:
        """Nothing to do; the stream is not ours."""


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


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
        """Print the record above the line."""
        shown = self.terminal.shown
        try:
            self.terminal.print(self._rendered(styled(record, self._width)))
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


class FileLog:
    """Appends one line to a file for each record; a file that cannot be written is warned of once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # warnings come from any thread
        self._file: TextIO | None = None
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1, errors="backslashreplace")
        except OSError as error:
            self._give_up(error)

    def write(self, record: LogRecord) -> None:
        """Append the record."""
        failure = None
        with self._lock:
            if self._file is not None:
                try:
                    self._file.write(record.file_line + "\n")
                except OSError as error:
                    failure = error
                    self._let_go()
        if failure is not None:
            self._give_up(failure)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(f"nothing more is logged to {self._path}: {error}", stacklevel=2)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is in its buffer is tried once more
                self._file.close()
            self._file = None


class FunctionSink:
    """Hands each record to a function; what it raises goes the way of what a hook raises."""

    def __init__(self, function: Callable[[LogRecord], object]) -> None:
        self._function = function

    def write(self, record: LogRecord) -> None:
        """Call the function."""
        self._function(record)

    def close(self) -> None:
        """Nothing to do."""
