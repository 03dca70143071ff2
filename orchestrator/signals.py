"""SIGTERM and SIGINT become requests to halt; waiting for data gives way to them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["GiveWay", "Signals", "in_notebook", "leave"]

HANDLED = (signal.SIGTERM, signal.SIGINT)


class GiveWay(BaseException):
    """Raised out of work that has changed nothing yet, so that a halt need not wait for it."""


class Signals:
    """Installs the handlers, in the main thread only, and puts back those that were there before.

    The first signal calls `request(signal)`, and raises GiveWay where `waiting()` says that the main thread
    waits for data; a second SIGINT raises KeyboardInterrupt on the spot. `told` is what whoever pressed Ctrl-C for the
    first time reads on the terminal: until the boundary nothing else would tell that it was heard.
    """

    def __init__(
        self, request: Callable[[signal.Signals], None], waiting: Callable[[], bool], told: str = ""
    ) -> None:
        self._request = request
        self._waiting = waiting
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._seen = False
        self._told = told

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child, a data worker for instance: not its business
            return
        which = signal.Signals(number)
        if self._seen and which is signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = True
        self._request(which)
        if self._told and which is signal.SIGINT:
            # Past the streams, whose locks the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self._told}\n".encode())
        earlier = self._before.get(which)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)
        if self._waiting():
            raise GiveWay


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def leave(which: signal.Signals) -> BaseException:
    """How `fit` leaves after a halt on `which`: KeyboardInterrupt, or SystemExit(128 + number)."""
    if which is signal.SIGINT:
        return KeyboardInterrupt()
    return SystemExit(128 + which)
