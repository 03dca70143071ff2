"""What a run is doing at this moment: for how long already, how fast, and where its newest time went."""

import contextlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.callbacks.logs.progress import batches_left
from orchestrator.commands.standing import (
    Life,
    Measured,
    Standing,
    newest_metrics,
    places_of,
    standing_of,
)
from states.table import State, Trigger
from tracking.journal import TRAIN, Attempt, Checkpoint, Journal, LogRecord, RunInfo, Transition
from tracking.packed import one_of_metrics
from tracking.runs import Holder, RunFolder
from tracking.schema import connect_to_read
from tracking.tally import BETWEEN, VALIDATION, Total

__all__ = ["Moment", "Pace", "Work", "pace_of", "seize", "spent", "work_at_hand"]

_NEWEST = 2048  # transitions that are looked at
_PACE_S = 60.0
_MOST_WARNINGS = 3
_OF_TRAINING = "packed.batch >= 0 AND packed.scope = (SELECT scope FROM scopes WHERE name = ?2)"
_NEWEST_BATCH = one_of_metrics("1", f"packed.attempt = ?1 AND {_OF_TRAINING}", "step", "time_ns")
_FIRST_BATCH = one_of_metrics("?1", _OF_TRAINING, "step", "time_ns", oldest=True)
_FROM_ID = one_of_metrics("?1", "TRUE", "attempt", "time_ns", oldest=True)
_UNUSUAL_S, _UNUSUAL = 1.0, 10.0
"""Work that takes longer than the first, and than so many times what it usually takes, is told apart."""


@dataclass(frozen=True)
class Work:
    """What is being worked on: the trigger that comes next (None where two may), in words, and since when."""

    trigger: Trigger | None
    words: str
    since_ns: int
    usual_ns: int | None
    """What it took on average lately; None where it is not known."""

    def unusual(self, now_ns: int) -> bool:
        """Does it take much longer than usual?"""
        took = now_ns - self.since_ns
        return took > _UNUSUAL_S * 1e9 and (self.usual_ns is None or took > _UNUSUAL * self.usual_ns)


@dataclass(frozen=True)
class Pace:
    """How fast batches go by lately, and how many seconds are left; None where that is not known."""

    batches_per_s: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class Process:
    """What this machine says about the process that trains: `state` as in /proc ('T': stopped), bytes of memory."""

    state: str
    memory_bytes: int


@dataclass(frozen=True)
class Moment:
    """A run as it stood at `now_ns`. `newest` are its newest transitions, all of them of the newest attempt."""

    run: RunFolder
    info: RunInfo
    now_ns: int
    standing: Standing
    newest: list[Transition]
    work: Work | None
    """None where nobody is at work."""
    pace: Pace
    spent: dict[str, Total]
    """Where the time of the newest transitions went, by trigger, VALIDATION and BETWEEN."""
    process: Process | None
    metrics: list[Measured]
    checkpoints: list[Checkpoint]
    warnings: list[LogRecord]
    positions: dict[int, Any]

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The run's attempts, oldest first."""
        return self.standing.life.attempts

    @property
    def over(self) -> bool:
        """Is nobody at work, or about to be?"""
        return self.standing.life.holder is None

    def wanted(self, name: str) -> int | None:
        """How many `epochs`, `max_batches` or `batches_per_epoch` there are to be; None where nothing says."""
        found = self.attempts[-1].params.get(name) if self.attempts else None
        return found if isinstance(found, int) else None

    @property
    def batches_in_epoch(self) -> int:
        """How many batches of the epoch at hand are complete."""
        return _batches_in_epoch(self.standing)

    @property
    def losses(self) -> list[float]:
        """The newest losses of the training, oldest first."""
        return [row.loss for row in self.newest if row.scope == TRAIN and row.loss is not None]


def seize(run: RunFolder, journal: Journal) -> Moment:
    """The run as it stands now. Holds nobody up, and takes as long for any run."""
    standing = standing_of(run, journal)
    life = standing.life
    now = time.time_ns()
    number = life.attempts[-1].attempt if life.attempts else 0
    newest = [row for row in journal.newest(_NEWEST) if row.attempt == number]
    went = spent(newest)
    work = work_at_hand(life, newest, went)
    return Moment(
        run=run,
        info=journal.run_info(),
        now_ns=now,
        standing=standing,
        newest=newest,
        work=work,
        pace=pace_of(run, standing, now),
        spent=went,
        process=_process(life.holder) if life.holder else None,
        metrics=newest_metrics(run),
        checkpoints=journal.checkpoints(),
        warnings=[record for record in journal.logs() if record.level == "WARNING"][-_MOST_WARNINGS:],
        positions=places_of(run, {a.position for a in life.attempts if a.position}),
    )


def spent(newest: Sequence[Transition]) -> dict[str, Total]:
    """Where the time of consecutive transitions of one attempt went: it adds up to that between first and last."""
    found: dict[str, Total] = defaultdict(Total)
    within = 0  # passes of validation, which are part of the transition of the training that comes next
    for row in newest:
        if row.scope == TRAIN:
            took = max(0, row.duration_ns - within)
            within = 0
            found[row.trigger.value].add(1, took, took)
        else:
            found[VALIDATION].add(1, row.duration_ns, row.duration_ns)
            within += row.duration_ns
    if newest:
        elapsed = newest[-1].time_ns - newest[0].time_ns + newest[0].duration_ns
        between = elapsed - sum(total.ns for total in found.values())
        if between > 0:
            found[BETWEEN].add(1, between, between)
    return dict(found)


_NEXT = {
    State.IDLE: Trigger.BEGIN_EPOCH,
    State.EPOCH_START: Trigger.FETCH,
    State.BATCH_START: Trigger.FORWARD,
    State.FORWARD: Trigger.BACKWARD,
    State.STEP: Trigger.END_BATCH,
}
_VALIDATING = {
    State.BATCH_START: Trigger.FORWARD.value,
    State.FORWARD: Trigger.END_BATCH.value,
    State.BATCH_END: Trigger.FETCH.value,
}


def work_at_hand(life: Life, newest: Sequence[Transition], went: dict[str, Total]) -> Work | None:
    """What comes after the newest transition of an attempt that is under way: told from the state it stands in."""
    if not life.running:
        return None
    attempt = life.attempts[-1]
    if not newest:
        begins = "starting" if attempt.position is None else "restoring a checkpoint"
        return Work(None, begins, attempt.started_ns, None)
    last = newest[-1]
    if last.scope != TRAIN:
        words = f"validation {last.scope.removeprefix('validation/')}"
        doing = _VALIDATING.get(last.dest)
        return Work(None, f"{words}, batch {last.batch}: {doing}" if doing else words, last.time_ns, None)
    trigger, words = _next(last, attempt.params)
    total = went.get(trigger.value) if trigger else None
    usual = total.ns // total.count if total else None
    return Work(trigger, words, last.time_ns, usual)


def _next(last: Transition, params: dict[str, Any]) -> tuple[Trigger | None, str]:
    epochs, length = params.get("epochs"), params.get("batches_per_epoch")
    trigger: Trigger | None
    match last.dest:
        case State.DONE | State.HALTED:
            return None, "saving, and leaving"
        case State.BATCH_END if length is not None and last.batch + 1 >= length:
            trigger = Trigger.END_EPOCH
        case State.BATCH_END:
            trigger = Trigger.FETCH
        case State.BACKWARD if params.get("accumulate", 1) == 1:
            trigger = Trigger.STEP
        case State.BACKWARD:
            return None, "step or end_batch"
        case State.EPOCH_END if epochs is not None and last.epoch + 1 >= epochs:
            trigger = Trigger.FINISH
        case State.EPOCH_END:
            trigger = Trigger.BEGIN_EPOCH
        case _:
            trigger = _NEXT[last.dest]
    return trigger, trigger.value


def pace_of(run: RunFolder, standing: Standing, now_ns: int) -> Pace:
    """How fast the newest attempt went over its last minute, validation and saves included."""
    attempts, last = standing.life.attempts, standing.last
    if not attempts or last is None:
        return Pace(None, None)
    rate = _rate(run, attempts[-1].attempt, now_ns if standing.life.running else None)
    params = attempts[-1].params
    left = batches_left(
        standing.batches or 0,
        max(0, last.epoch),
        _batches_in_epoch(standing),
        params.get("epochs"),
        params.get("batches_per_epoch"),
        params.get("max_batches"),
    )
    known = rate is not None and left is not None and standing.life.running
    return Pace(rate, left / rate if known and left is not None and rate else None)


def _batches_in_epoch(standing: Standing) -> int:
    last = standing.last
    if last is None or last.batch < 0:
        return 0
    complete = {last.dest, last.source} & {State.BATCH_END, State.EPOCH_END}
    return last.batch + (1 if complete and last.dest is not State.BATCH_START else 0)


def _rate(run: RunFolder, attempt: int, now_ns: int | None) -> float | None:
    """Batches a second by the values of batches in the journal; a stall counts up to `now_ns`."""
    with closing(connect_to_read(run.journal)) as connection:
        newest = connection.execute(_NEWEST_BATCH, (attempt, TRAIN)).fetchone()
        if newest is None:
            return None
        since = newest[2] - int(_PACE_S * 1e9)
        low, high = 1, newest[0]
        while low < high:  # ids go up with time, and with attempts
            middle = (low + high) // 2
            row = connection.execute(_FROM_ID, (middle,)).fetchone()
            if row[1] < attempt or row[2] < since:
                low = row[0] + 1
            else:
                high = middle
        first = connection.execute(_FIRST_BATCH, (low, TRAIN)).fetchone()
    elapsed = newest[2] - first[2]
    if now_ns is not None and now_ns - newest[2] > 1e9:
        elapsed = now_ns - first[2]
    batches = newest[1] - first[1]
    return batches / elapsed * 1e9 if batches > 0 and elapsed > 0 else None


def _process(holder: Holder) -> Process | None:
    """The process as this machine's /proc has it; None where it runs elsewhere, or another has its number now."""
    if holder.host != socket.gethostname():
        return None
    folder = Path(f"/proc/{holder.pid}")
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK") + _booted()
        pages = int((folder / "statm").read_text().split()[1])
        if abs(began - holder.started) < 2 or not holder.started:
            return Process(fields[0], pages * os.sysconf("SC_PAGE_SIZE"))
    return None


def _booted() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))
