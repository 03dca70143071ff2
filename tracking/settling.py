"""Where attempts begin and end: a new one's row, an end, and what is made up for a process that died."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from states.table import TERMINAL, Arc, State, Trigger
from tracking.frames import Record
from tracking.packed import NEWEST_SEQ, ROW_LENGTH, last_row, unpacked_transitions
from tracking.packing import Packer
from tracking.recorder import Recorder, RecorderError
from tracking.recorder_view import RecorderView, read_recorder
from tracking.rows import TRAIN, AttemptStart, Outcome
from tracking.runs import Lease, LeaseHeldError, RunFolder
from tracking.schema import Connection, JournalError, connect_to_write

__all__ = ["DIED", "Settled", "settle"]

DIED = "the process died"
"""The note of a `halt` that was made up, and the reason of the attempt."""


@dataclass(frozen=True)
class Settled:
    """What `settle` did for an attempt without an end.

    `drained` transitions were still in the recorder; `state` is where the training stood when it died.
    `notes` says what was odd (a recorder that could not be read, transitions that are missing).
    """

    attempt: int
    drained: int
    state: State
    notes: tuple[str, ...]


def settle(run: RunFolder, lease: Lease | None = None) -> Settled | None:
    """Give the attempt of a process that died its last transitions, its `halt` and its end.

    The caller may hold the run's lease; otherwise it is taken meanwhile. None if there was nothing to do,
    or the run is alive (its lease is held by another). Safe to call at any time, and to be killed in.
    Raises JournalError if the journal cannot be written.
    """
    if lease is not None:
        connection, _ = _connect(run, lease)
        try:
            return _settle(run, connection)
        finally:
            connection.close()
    try:
        with Lease.acquire(run, wait_s=0.0) as taken:
            return settle(run, taken)
    except LeaseHeldError:
        return None


def open_to_write(run: RunFolder, lease: Lease) -> tuple[Connection, str]:
    """The writer's connection to a run that is settled, and the notice of `connect_to_write`."""
    connection, notice = _connect(run, lease)
    try:
        _settle(run, connection)
    except BaseException:
        connection.close()
        raise
    return connection, notice


def _connect(run: RunFolder, lease: Lease) -> tuple[Connection, str]:
    if not lease.held or lease.path != run.path.resolve() / run.lease.name:
        raise JournalError(
            f"{run.path}: expected the lease of this run, held; found that of {lease.path}, "
            f"{'held' if lease.held else 'released'}"
        )
    return connect_to_write(run.journal)


def begin_attempt(
    connection: sqlite3.Connection,
    run: RunFolder,
    start: AttemptStart,
    make_recorder: Callable[[int, int], Recorder],
) -> Recorder:
    """Write the row of the next attempt, and make its recorder: both, or neither.

    `make_recorder` is given the attempt's number and the seq of its first transition. Raises JournalError if
    `start.position` does not fit, and what `make_recorder` raises.
    """
    recorder = None
    try:
        connection.execute("BEGIN IMMEDIATE")
        attempt = 1 + connection.execute("SELECT coalesce(max(attempt), 0) FROM attempts").fetchone()[0]
        first_seq = newest_seq(connection) + 1
        _check_position(connection, run, attempt, start.position)
        connection.execute(
            """INSERT INTO attempts (attempt, position, first_seq, started_ns, pid, host, process_started,
                                     command, params, versions, device)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                attempt,
                start.position,
                first_seq,
                start.started_ns,
                start.pid,
                start.host,
                start.process_started,
                _json(start.command),
                _json(dict(start.params)),
                _json(dict(start.versions)),
                start.device,
            ),
        )
        if start.position is not None:
            connection.execute(
                "UPDATE attempts SET kept_until = min(coalesce(kept_until, ?1), ?1) WHERE attempt < ?2",
                (start.position, attempt),
            )
        # A recorder whose attempt has no row, after a kill between these two lines, is ignored by everybody.
        recorder = make_recorder(attempt, first_seq)
        connection.execute("COMMIT")
    except BaseException as error:
        _roll_back(connection)
        if recorder is not None:
            recorder.close()
        if isinstance(error, sqlite3.Error):
            raise JournalError(f"{run.journal}: cannot write down the new attempt ({error})") from error
        raise
    return recorder


def end_attempt(
    connection: sqlite3.Connection,
    attempt: int,
    outcome: Outcome,
    reason: str,
    exception: str,
    ended_ns: int,
) -> None:
    """Fill in the end of an attempt whose transitions are all in the journal."""
    row = last_of(connection, attempt, TRAIN)
    state = row.dest if row else _first_state(attempt)
    connection.execute(
        """UPDATE attempts SET ended_ns = ?, end_state = ?, outcome = ?, reason = ?, exception = ?
           WHERE attempt = ?""",
        (ended_ns, state.value, outcome, reason, exception, attempt),
    )


def newest_seq(connection: sqlite3.Connection) -> int:
    """The seq of the newest transition in the journal, superseded or not; 0 if there is none."""
    return int(connection.execute(NEWEST_SEQ).fetchone()[0])


@dataclass(frozen=True)
class LastRow:
    """The last transition of one scope of an attempt."""

    epoch: int
    batch: int
    dest: State
    time_ns: int


def last_of(connection: sqlite3.Connection, attempt: int, scope: str) -> LastRow | None:
    """The last transition of `scope` in `attempt`; None if there is none."""
    found = connection.execute(
        last_row(
            "(SELECT first_seq FROM attempts WHERE attempt = ?1)",
            "?2",
            "packed.attempt = ?1 AND packed.scope = (SELECT scope FROM scopes WHERE name = ?3)",
        ),
        (attempt, newest_seq(connection), scope),
    ).fetchone()
    if found is None:
        return None
    row = connection.execute(
        f"SELECT epoch, batch, dest, time_ns FROM ({unpacked_transitions('?1', '?1')}) ORDER BY seq DESC LIMIT 1",
        found[:1],
    ).fetchone()
    return LastRow(row[0], row[1], State(row[2]), row[3]) if row else None


def _check_position(
    connection: sqlite3.Connection, run: RunFolder, attempt: int, position: int | None
) -> None:
    if (position is None) != (attempt == 1):
        raise JournalError(
            f"{run.id}: attempt {attempt} with position {position}; expected None for the first "
            "attempt, and the seq of the transition that is gone back to for each later one"
        )
    if not position:
        return
    if not connection.execute(
        f"""SELECT 1 FROM ({unpacked_transitions(f"?1 - {ROW_LENGTH - 1}", "?1")})
            WHERE seq = ?1 AND scope = ?2 AND NOT superseded""",
        (position, TRAIN),
    ).fetchone():
        raise JournalError(
            f"{run.id}: cannot go back to transition {position}: expected a training transition in the "
            "journal that is not superseded; resume from a newer checkpoint, or begin a new run"
        )


def _first_state(attempt: int) -> State:
    return State.IDLE if attempt == 1 else State.HALTED


def _settle(run: RunFolder, connection: Connection) -> Settled | None:
    try:
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute(
            "SELECT attempt, outcome, started_ns FROM attempts ORDER BY attempt DESC LIMIT 1"
        ).fetchone()
        settled = None
        if row is not None and row[1] is None:
            settled = _settle_attempt(run, connection, row[0], row[2])
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        _roll_back(connection)
        raise JournalError(f"{run.journal}: cannot settle the run ({error})") from error
    except BaseException:
        _roll_back(connection)
        raise
    return settled


def _settle_attempt(run: RunFolder, connection: Connection, attempt: int, started_ns: int) -> Settled:
    view, notes = _recorder_of(run, attempt)
    drained: list[Record] = []
    if view is not None:
        packer = Packer(connection, attempt, view.arcs, view.scopes, view.phases)
        newest = newest_seq(connection)
        drained = _following(view.records, newest)
        packer.records(drained)
        for record in view.records:
            if record.seq in view.late and record.seq <= newest:
                packer.late_loss(record.seq, record.loss)
        notes += _losses(view, newest, drained)
    last = _last_rows(connection, attempt)
    ended_ns = max([started_ns, *(row.time_ns for row in last.values())])
    if (
        attempt == 1
    ):  # where no transition has been made, the first attempt stands in IDLE, later ones in HALTED
        last.setdefault(TRAIN, LastRow(-1, -1, State.IDLE, started_ns))
    _append_halts(connection, attempt, last, ended_ns)
    end_attempt(connection, attempt, "died", DIED, "", ended_ns)
    state = last[TRAIN].dest if TRAIN in last else State.HALTED
    return Settled(attempt, len(drained), state, tuple(notes))


def _recorder_of(run: RunFolder, attempt: int) -> tuple[RecorderView | None, list[str]]:
    try:
        view = read_recorder(run.recorder)
    except FileNotFoundError:
        return None, []
    except (OSError, RecorderError) as error:
        return None, [f"the flight recorder could not be read, its newest transitions are lost: {error}"]
    # A process that died between its attempt's row and its recorder left that of the attempt before.
    return (view, []) if view.attempt == attempt else (None, [])


def _following(records: Sequence[Record], newest: int) -> list[Record]:
    """The records that follow `newest` without a gap."""
    later = [record for record in records if record.seq > newest]
    return [
        record for _, record in takewhile(lambda pair: pair[0] == pair[1].seq, enumerate(later, newest + 1))
    ]


def _losses(view: RecorderView, newest: int, drained: list[Record]) -> list[str]:
    lost = sum(record.seq > newest for record in view.records) - len(drained)
    if not (lost or view.damaged):
        return []
    return [
        f"{view.path}: {view.damaged} frames made no sense, and {lost} transitions after a gap were left out"
    ]


def _last_rows(connection: Connection, attempt: int) -> dict[str, LastRow]:
    """The last transition of each scope that the attempt has been in."""
    names = [name for (name,) in connection.execute("SELECT name FROM scopes ORDER BY scope")]
    found = {name: last_of(connection, attempt, name) for name in names}
    return {name: row for name, row in found.items() if row is not None}


def _append_halts(connection: Connection, attempt: int, last: dict[str, LastRow], time_ns: int) -> None:
    """A `halt` for each word that was cut off: validation passes first, then the training."""
    cut = [name for name, row in last.items() if row.dest not in TERMINAL]
    cut.sort(key=lambda name: name == TRAIN)
    arcs = [Arc(Trigger.HALT, last[name].dest, State.HALTED) for name in cut]
    packer = Packer(
        connection,
        attempt,
        [(arc.trigger.value, arc.source.value, arc.dest.value) for arc in arcs],
        cut,
        [""],
    )
    seq = newest_seq(connection) + 1
    records = [
        Record(seq + at, at, at, 0, last[name].epoch, last[name].batch, time_ns, 0, float("nan"), DIED)
        for at, name in enumerate(cut)
    ]
    packer.records(records)


def _json(value: object) -> str:
    return json.dumps(value, default=str)


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")
