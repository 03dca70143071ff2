"""What hooks, signals and user code ask for; carried out at the next boundary between transitions."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import TaintedError
from orchestrator.snapshot.writer import SaveHandle
from states.table import State

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
        self.stall_s: float | None = None
        """Seconds that the training has stood still for it; None before it is begun.

        Where the copy goes on beside the training, the next update waits for the rest of it, and adds to them.
        """

    def begun(self, handle: SaveHandle, stall_s: float = 0.0) -> None:
        """The state has been captured, which took `stall_s` seconds; `handle` follows the writing."""
        self.stall_s = stall_s
        self._handle.set_result(handle)

    def waited(self, seconds: float) -> None:
        """The training has waited for the rest of the copy."""
        self.stall_s = (self.stall_s or 0.0) + seconds

    def abandoned(self, why: str) -> None:
        """It will not be made."""
        self._handle.set_exception(TaintedError(f"this checkpoint was not made: {why}"))

    @property
    def done(self) -> bool:
        """Whether the checkpoint is on disk."""
        return self._handle.done() and self._handle.exception() is None and self._handle.result().done

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it: it is on disk, has failed, or was never made."""
        return self._handle.done() and (self._handle.exception() is not None or self._handle.result().done)

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
    """Of the next boundary."""
    later: list[tuple[State, Save]] = field(default_factory=list)
    """Of the next boundary at which the training stands in this state."""
    open: bool = False
    """Whether the next boundary is to be looked at; what asks for something at one sets it."""

    def add_save(self, save: Save, at: State | None = None) -> None:
        """Ask for a checkpoint of the next boundary, or of the next one at which the training stands in `at`."""
        if at is None:
            self.saves.append(save)
        else:
            self.later.append((at, save))
        self.open = True

    def looked_at(self) -> None:
        """What is open after a boundary was looked at is open at the next one too."""
        self.open = False
        if self.halt is not None or self.saves or self.later:  # after it: a signal may ask in between
            self.open = True

    def arrive(self, state: State) -> None:
        """The training has reached `state`: what was to be saved there is to be saved now."""
        self.saves += [save for at, save in self.later if at is state]
        self.later = [(at, save) for at, save in self.later if at is not state]

    def awaits(self, state: State) -> bool:
        """Whether `state` is to be saved when it is next reached."""
        return any(at is state for at, _ in self.later)

    def clear(self) -> None:
        """Forget everything: nobody waits for an answer."""
        self.stop, self.halt, self.saves, self.later = None, None, [], []

    def copy(self) -> Requests:
        """The same requests, to be put back by `take`."""
        return Requests(self.stop, self.halt, list(self.saves), list(self.later))

    def take(self, other: Requests) -> None:
        """Be what `other` is."""
        self.stop, self.halt, self.saves, self.later = other.stop, other.halt, other.saves, other.later
        self.open = True

    def add_halt(self, request: HaltRequest) -> None:
        """The first reason to halt is the one that counts, but an error outranks a wish."""
        if self.halt is None or (self.halt.error is None and request.error is not None):
            self.halt = request
        self.open = True

    def abandon_saves(self, why: str) -> None:
        """Answer whoever waits for a save of this boundary that will not come."""
        for save in self.saves:
            save.abandoned(why)
        self.saves.clear()

    def abandon_all_saves(self, why: str) -> None:
        """Answer whoever waits for any save: none will come."""
        self.saves += [save for _, save in self.later]
        self.later.clear()
        self.abandon_saves(why)
