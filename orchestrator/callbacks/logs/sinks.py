"""Sinks: where log records go. A console in plain lines, a file, a function; `live.py` has the one that draws."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO

from orchestrator.callbacks.logs.record import LogRecord
from orchestrator.warning import warn

__all__ = ["FileLog", "FunctionSink", "PlainConsole", "Sink", "live_wanted"]


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
        warn(f"nothing more is logged to {self._path}: {error}")

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
