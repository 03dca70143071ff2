"""What hooks, signals and user code ask for; carried out at the next boundary between transitions."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import TaintedError
from orchestrator.snapshot.writer import SaveHandle

__all__ = ["HaltRequest", "Requests", "Save"]


@dataclass(frozen=True)
class HaltRequest:
    """Go to HALTED at the next boundary."""

    reason: str
    save: bool = True
    """Save first; not where what memory holds is not worth keeping."""
    error: BaseException | None = None
    """What `fit` raises once the training stands in HALTED."""
    signal: bool = False
    """A signal asked for it, so `fit` leaves by `error` wherever the training stands by then."""


class Save:
    """A checkpoint that was asked for; `wait()` gives its path once it is safely on disk."""

    def __init__(self) -> None:
        self._handle: Future[SaveHandle] = Future()

    def begun(self, handle: SaveHandle) -> None:
        """The state has been captured; `handle` follows the writing."""
        self._handle.set_result(handle)

    def abandoned(self, why: str) -> None:
        """It will not be made."""
        self._handle.set_exception(TaintedError(f"this checkpoint was not made: {why}"))

    @property
    def done(self) -> bool:
        """Whether the checkpoint is on disk."""
        return self._handle.done() and self._handle.exception() is None and self._handle.result().done

    def wait(self, timeout: float | None = None) -> Path:
        """The path of the checkpoint, once it is durable.

        Raises TaintedError if it was never made, TimeoutError after `timeout` seconds, and what the
        writer raised. Do not wait inside a hook: a save begins when the transition is over.
        """
        return self._handle.result(timeout).wait(timeout)


@dataclass
class Requests:
    """The requests that are open."""

    stop: str | None = None
    """Training state: saved, and honoured after a resume."""
    halt: HaltRequest | None = None
    saves: list[Save] = field(default_factory=list)

    def add_halt(self, request: HaltRequest) -> None:
        """The first reason to halt is the one that counts, but an error outranks a wish."""
        if self.halt is None or (self.halt.error is None and request.error is not None):
            self.halt = request

    def abandon_saves(self, why: str) -> None:
        """Answer whoever waits for a save that will not come."""
        for save in self.saves:
            save.abandoned(why)
        self.saves.clear()
