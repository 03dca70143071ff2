"""The journal's one writer: a background thread that drains the recorder, and what the loop hands to it."""

import contextlib
import importlib
import json
import sqlite3
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, starmap
from typing import TypeVar

from states.table import ARCS
from tracking.packing import Packer, from_number
from tracking.recorder import Recorder
from tracking.rows import AttemptStart, CheckpointRow, Outcome
from tracking.runs import Lease, RunFolder
from tracking.schema import Connection, JournalError
from tracking.settling import begin_attempt, end_attempt, open_to_write
from tracking.values import Values

__all__ = ["JournalStalledError", "JournalWriter", "open_attempt"]

_PERIOD_S = 0.25
_WHOLE = 16
"""Batches of one drain from which on the newest, which is not complete, is left for the next: two rows less."""
_MOST_QUEUED = 200_000
_FULL_ENOUGH = 0.75  # of the recorder: room is left to record the halt


class JournalStalledError(JournalError):
    """The journal cannot be written, and what waits for it has reached its bound."""


@dataclass(frozen=True)
class _Log:
    level: str
    message: str
    time_ns: int


@dataclass(frozen=True)
class _Removed:
    name: str
    time_ns: int


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    reason: str
    exception: str
    time_ns: int


T = TypeVar("T")
_Event = CheckpointRow | _Removed | _Log | _End


def open_attempt(
    run: RunFolder,
    lease: Lease,
    start: AttemptStart,
    scopes: Sequence[str],
    phases: Sequence[str],
    *,
    capacity: int = 16384,
    warn: Callable[[str], None] | None = None,
) -> tuple[Recorder, "JournalWriter"]:
    """Begin the run's next attempt: settle the one before, write the new one down, start the writer.

    `scopes` and `phases` are what the recorder's transitions index. `warn` is told of storage trouble, from
    the writer's thread; default: `warnings.warn`. Raises JournalError if `lease` is not this run's, or if
    `start.position` is not that of a transition to go back to; RecorderError if there is no space.
    """
    importlib.import_module("tracking.blocks")  # now, and not when the thread first needs it
    connection, notice = open_to_write(run, lease)
    try:
        recorder = begin_attempt(
            connection,
            run,
            start,
            lambda attempt, first_seq: Recorder.create(
                run.recorder,
                attempt=attempt,
                next_seq=first_seq,
                scopes=scopes,
                phases=phases,
                capacity=capacity,
            ),
        )
    except BaseException:
        connection.close()
        raise
    return recorder, JournalWriter(
        connection, recorder, scopes=scopes, phases=phases, notice=notice, warn=warn
    )


class JournalWriter:
    """Writes one attempt to the journal, four times a second. Made by `open_attempt`.

    The methods may be called from any thread of the process, `metrics` from one; but for `sync`, `end` and `close`
    they only append to a queue. A transition leaves the recorder when its row is durable, so a kill loses none. Of
    metrics and messages a kill loses those of the last quarter second: so `sync` before a checkpoint is
    announced, and a resume replays the batches whose metrics are missing.

    When storage fails, the recorder and the queue keep what comes, up to a bound: near it `failure` says so,
    and when they are full, `record` and the methods here raise JournalStalledError.
    """

    def __init__(
        self,
        connection: Connection,
        recorder: Recorder,
        *,
        scopes: Sequence[str],
        phases: Sequence[str],
        notice: str = "",
        warn: Callable[[str], None] | None = None,
    ):
        self.attempt = recorder.attempt
        self.notice = notice
        """What the user should know about the file system; '' if nothing."""
        self._connection = connection
        self._recorder = recorder
        self._lists = (scopes, phases)
        self._packer: Packer | None = None
        self._warn = warn or _warn
        self.values = Values(self._check_room)
        """What is measured, for one thread to put in: that of the training."""
        self._events: deque[_Event] = deque()
        self._late: deque[tuple[int, float]] = deque()
        # Taken from the queues by the thread, until they are durable.
        self._held_events: list[_Event] = []
        self._held_late: list[tuple[int, float]] = []
        self._trouble: Exception | None = None
        self._turn = threading.Condition()
        self._wanted = self._done = 0  # drains asked for, and done
        self._closing = self._closed = False
        recorder.on_full = self._make_room
        self._thread = threading.Thread(target=self._work, name="interlock-journal", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> JournalStalledError | None:
        """An error, while storage fails and what is kept in memory nears its bound: time to halt."""
        trouble = self._trouble
        if trouble is None or (self._recorder.fill < _FULL_ENOUGH and self.queued < _MOST_QUEUED):
            return None
        error = JournalStalledError(
            f"{self._connection.file}: the journal cannot be written ({trouble}), and what may be kept in "
            "memory meanwhile is used up; make room on the disk, then resume the run"
        )
        error.__cause__ = trouble
        return error

    @property
    def queued(self) -> int:
        """How many records wait in memory, transitions not counted."""
        return len(self.values) + len(self._held_events) + len(self._events)

    def metrics(
        self,
        scope: str,
        epoch: int,
        batch: int,
        step: int,
        values: Mapping[str, float],
        time_ns: int,
        *,
        seq: int | None = None,
    ) -> None:
        """Queue values measured in a batch (`batch` = -1: in an epoch).

        `seq` is the transition that they belong to, and are superseded with; default: the one whose work is
        going on, which is recorded next. Values that arrive late name the transition they came from.
        """
        if values:
            if seq is None:
                seq = self._recorder.next_seq
            self.values.put(seq, scope, epoch, batch, step, time_ns, values)

    def log(self, level: str, message: str, time_ns: int | None = None) -> None:
        """Queue a message; `time_ns` is since 1970, default: now."""
        self._put(_Log(level, message, time.time_ns() if time_ns is None else time_ns))

    def checkpoint(self, row: CheckpointRow) -> None:
        """Queue the row of a checkpoint that is durable."""
        self._put(row)

    def checkpoint_removed(self, name: str, time_ns: int | None = None) -> None:
        """Queue that retention removed a checkpoint; `time_ns` is since 1970, default: now."""
        self._put(_Removed(name, time.time_ns() if time_ns is None else time_ns))

    def late_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of an earlier `forward`, in the recorder and in the journal.

        Raises ValueError if `seq` is no `forward` of this attempt that the recorder still knows of.
        """
        # The recorder first: a drain that has seen the queue's entry then has seen the slot's loss too.
        self._recorder.set_loss(seq, loss)
        self._late.append((seq, loss))

    def sync(self, timeout_s: float = 30.0) -> None:
        """Wait until everything recorded and queued so far is durable.

        Raises JournalError, with the cause, if it cannot be made so within `timeout_s`.
        """
        self._check_open()
        with self._turn:
            self._wanted += 1
            mine = self._wanted
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._done >= mine or self._closed, timeout_s)
            if self._done < mine:
                raise JournalError(
                    f"{self._connection.file}: not synced after {timeout_s:g} s "
                    f"({self._trouble or 'the journal is busy'}); transitions are safe in the flight recorder"
                ) from self._trouble

    def end(
        self, outcome: Outcome, reason: str = "", exception: str = "", *, time_ns: int | None = None
    ) -> None:
        """End the attempt: everything so far and its end are durable when this returns.

        The end state is that of the last training transition. Raises JournalError as `sync` does.
        """
        self._put(_End(outcome, reason, exception, time.time_ns() if time_ns is None else time_ns))
        self.sync()

    def close(self) -> None:
        """Write what is left, stop the thread, close the journal and the recorder. Never raises.

        An attempt that was not ended before is settled later as one whose process died, and so are
        transitions that storage refuses: they stay in the recorder's file.
        """
        if self._connection.forgotten:
            return
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self._thread.join()
        if self.queued and not self._recorder.closed:
            self._tell(
                f"{self._connection.file}: {self.queued} metrics and messages were lost "
                f"({self._trouble}); the transitions are in {self._recorder.path.name}, and not lost"
            )
        self._recorder.close()

    def __enter__(self) -> "JournalWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, event: _Event) -> None:
        self._check_room()
        self._events.append(event)

    def _check_room(self) -> None:
        if self._trouble and self.queued >= 2 * _MOST_QUEUED and (failure := self.failure):
            raise failure

    def _check_open(self) -> None:
        self._connection.check_ours()
        if self._closing:
            raise JournalError(f"{self._connection.file}: this journal's writer is closed")

    def _make_room(self) -> None:
        """The loop waits: the recorder is full."""
        if failure := self.failure:
            raise failure
        self._check_open()
        with self._turn:
            self._wanted += 1
            self._turn.notify_all()
            self._turn.wait(0.05)

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closing or self._wanted > self._done, _PERIOD_S)
                wanted, closing = self._wanted, self._closing
            written = self._drain(everything=closing or wanted > self._done)
            with self._turn:
                if written:
                    self._done = wanted
                if closing:
                    self._closed = True
                self._turn.notify_all()
            if closing:
                break
            if not written:
                time.sleep(_PERIOD_S)
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _drain(self, *, everything: bool) -> bool:
        """Write down what there is, in one transaction, but for a batch under way; did it work?"""
        # Events first, so that what was measured before one comes with it.
        _move(self._events, self._held_events)
        values = self.values.take()
        _move(self._late, self._held_late)
        chunk, position = self._recorder.take(whole=0 if everything else _WHOLE)
        if not (values or self._held_events or self._held_late or chunk):
            self._recovered()
            return True
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            packer = self._packer = self._packer or self._new_packer()
            packer.transitions(chunk)
            known = chunk.first if chunk else self._recorder.next_seq
            for seq, loss in self._held_late:
                if seq < known:
                    packer.late_loss(seq, loss)
            packer.metrics(values, self.values.kinds)
            self._write_events(self._held_events)
            self._connection.execute("COMMIT")
        except Exception as error:  # a thread that died silently would stop the training without a word
            self._roll_back()
            self._failed(error)
            return False
        self._recorder.release(position)
        self.values.release(len(values))
        self._held_events.clear()
        self._held_late.clear()
        self._recovered()
        return True

    def _new_packer(self) -> Packer:
        arcs = [(arc.trigger.value, arc.source.value, arc.dest.value) for arc in ARCS]
        return Packer(self._connection, self.attempt, arcs, *self._lists)

    def _write_events(self, events: list[_Event]) -> None:
        for event in events:
            match event:
                case CheckpointRow():
                    self._write_checkpoint(event)
                case _Removed(name, time_ns):
                    self._connection.execute(
                        "UPDATE checkpoints SET removed_ns = ? WHERE name = ?", (time_ns, name)
                    )
                case _Log(level, message, time_ns):
                    self._connection.execute(
                        "INSERT INTO logs VALUES (NULL, ?, ?, ?, ?)", (self.attempt, time_ns, level, message)
                    )
                case _End(outcome, reason, exception, time_ns):
                    end_attempt(self._connection, self.attempt, outcome, reason, exception, time_ns)

    def _write_checkpoint(self, row: CheckpointRow) -> None:
        metrics = {key: from_number(float(value)) for key, value in row.metrics.items()}
        self._connection.execute(
            "INSERT INTO checkpoints VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                row.name,
                self.attempt,
                row.seq,
                row.epoch,
                row.batch,
                row.state.value,
                row.size_bytes,
                row.time_ns,
                row.duration_ns,
                row.best,
                json.dumps(metrics),
            ),
        )

    def _roll_back(self) -> None:
        self._packer = None  # it remembers words that are not in the journal now
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _failed(self, error: Exception) -> None:
        if self._trouble is None:
            self._tell(
                f"{self._connection.file}: cannot write the journal ({error}). Training goes on, and what "
                "it records is kept in memory for a while: make room on the disk, "
                "or end the program that holds the file"
            )
        self._trouble = error

    def _tell(self, message: str) -> None:
        """Warn; where warnings are errors, by a line on standard error: the thread must go on, and closing be done."""
        try:
            self._warn(message)
        except Exception:
            print(message, file=sys.stderr)

    def _recovered(self) -> None:
        if self._trouble is not None:
            self._trouble = None
            self.log("WARNING", "the journal could not be written for a while; now everything is")


def _move(queue: deque[T], held: list[T]) -> None:
    """Move what is in `queue` now; other threads may append meanwhile, so it is not iterated over."""
    held.extend(starmap(queue.popleft, repeat((), len(queue))))


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
