"""Terminal: one live line at the bottom of a terminal, above which everything else is written."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TextIO

from tracking.forks import forget_in_children

__all__ = ["Terminal"]

_ERASE = "\r\x1b[2K"
_UNFINISHED = 1.0
"""Seconds that a line somebody has begun, and not ended, is left alone."""

_Write = Callable[[str], int]
_Flush = Callable[[], None]


class Terminal:
    """Keeps one line at the bottom of the terminal that `streams` write to, the first of which shows it.

    What anybody writes to the streams erases the line first, so nothing is torn; `show` brings it back.
    Nothing of the terminal's own state is changed (no hidden cursor), so nothing needs to be restored
    after a kill. The streams' `write` and `flush` are replaced on the objects themselves, since loggers
    keep references to them, until `close`.

    Raises AttributeError for streams whose methods cannot be replaced.
    """

    def __init__(self, *streams: TextIO) -> None:
        self._lock = threading.RLock()
        self._shown = False
        self._line_begun = 0.0
        """When somebody last wrote a line without its end; 0 if the cursor is at the start of a line."""
        self._closed = False
        self._own: list[tuple[TextIO, _Write, _Flush]] = []
        self._write: _Write = streams[0].write
        self._flush: _Flush = streams[0].flush
        for stream in dict.fromkeys(streams):
            self._replace(stream)
        forget_in_children(self)
        atexit.register(self.close)

    def _replace(self, stream: TextIO) -> None:
        write, flush = stream.write, stream.flush

        def write_above(text: str) -> int:
            if self._closed:
                return write(text)
            with self._lock:
                self._erase()
                written = write(text)
                if text:
                    # The second is what another live line, of a training within this one, leaves behind.
                    ended = text.endswith(("\n", _ERASE))
                    self._line_begun = 0.0 if ended else time.monotonic()
            return written

        def flush_above() -> None:
            # input() flushes before it asks; its question must not stand behind the line.
            if not self._closed:
                with self._lock:
                    self._erase()
            flush()

        stream.write = write_above  # type: ignore[method-assign]
        stream.flush = flush_above  # type: ignore[method-assign]
        self._own.append((stream, write_above, flush_above))

    @property
    def shown(self) -> bool:
        """Whether the line is there; not after somebody else has written, until the next `show`."""
        return self._shown

    def show(self, line: str) -> None:
        """Show `line`, which may have escape sequences for colours, in place of the last one."""
        with self._lock:
            if self._closed:
                return
            if self._line_begun:
                if time.monotonic() - self._line_begun < _UNFINISHED:
                    return
                self._write("\n")
                self._line_begun = 0.0
            self._write(_ERASE + line)
            self._flush()
            self._shown = True

    def print(self, text: str) -> None:
        """Write whole lines above the line."""
        with self._lock:
            self._erase()
            if self._line_begun:
                self._write("\n")
                self._line_begun = 0.0
            self._write(text.rstrip("\n") + "\n")
            self._flush()

    def _erase(self) -> None:
        if self._shown:
            self._shown = False
            self._write(_ERASE)
            self._flush()

    def close(self) -> None:
        """Erase the line and leave the streams as they were. Idempotent."""
        with self._lock:
            if self._closed:
                return
            try:
                self._erase()
            finally:
                self._closed = True
                self._put_back()
        atexit.unregister(self.close)

    def forget(self) -> None:
        """In a forked child: write as if there had never been a live line. Takes no lock."""
        self._closed = True
        self._put_back()

    def _put_back(self) -> None:
        for stream, write, flush in self._own:
            # Where somebody has replaced them after us, theirs stay, and go through ours, which do nothing now.
            if stream.__dict__.get("write") is write:
                del stream.write
            if stream.__dict__.get("flush") is flush:
                del stream.flush
        self._own.clear()
