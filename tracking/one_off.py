"""Processes that do one thing for the shipper: it looks after them, and they end with it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tracking import processes

__all__ = ["OneOff", "go_with_parent"]

_PR_SET_PDEATHSIG = 1


class OneOff:
    """`python -m MODULE ARGUMENTS`, at the shipper's low priority; its complaints go where the shipper's go."""

    def __init__(self, module: str, *arguments: str, output: Path, limit_s: float | None = None):
        """`output` is the file that takes what it prints. After `limit_s` seconds it is ended."""
        self._deadline = None if limit_s is None else time.monotonic() + limit_s
        with output.open("wb") as stdout:
            self._process = subprocess.Popen(
                processes.command(module, *arguments), stdin=subprocess.DEVNULL, stdout=stdout
            )

    def wait(self, seconds: float) -> int | None:
        """Wait for its end for at most so long; its exit status, None if it is still at work."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


def go_with_parent() -> None:
    """Have the kernel end this process when its parent ends, whatever ends that (Linux, prctl(2))."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
