"""Reading a journal, and the flight recorder beside it, while a trainer writes or long after."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, groupby, islice
from operator import itemgetter
from typing import Any

from states.language import Chain
from states.table import State, Trigger
from tracking.frames import STEPS_IN_A_FRAME, Record, is_pending
from tracking.packed import (
    BLOCK_ROWS,
    NEWEST_METRICS,
    NEWEST_SEQ,
    ROW_LENGTH,
    last_row,
    transitions_between,
    unpacked_transitions,
    values_of,
)
from tracking.packing import to_number
from tracking.places import Stretch, find_row, losses_of, of_epoch, stretches
from tracking.recorder import RecorderError
from tracking.recorder_view import RecorderView, read_recorder
from tracking.rows import (
    TRAIN,
    Attempt,
    Checkpoint,
    LogRecord,
    Loss,
    Measured,
    Metric,
    Packed,
    Parent,
    RunInfo,
    Transition,
)
from tracking.runs import RunFolder
from tracking.schema import Connection, connect_to_read, explained

__all__ = ["Journal"]

_PAGE = 4096  # transitions, or rows of values, a read transaction: short ones let the writer's WAL be emptied
_MANY = 65536  # of the transitions where little is read of each
_LATEST = 512  # frames of the recorder: more than are usually not in the journal yet
_NEWEST = 16  # frames: enough for the newest transition of a scope, unless another one's follow it

_PACKED = f"""
    SELECT packed.seq, packed.attempt, scopes.name, packed.epoch, packed.batch, packed.word, attempts.kept_until
    FROM {transitions_between("?1", "?2", {"seq", "attempt", "scope", "epoch", "batch", "word"})} AS packed
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
    ORDER BY packed.seq"""
_TRANSITIONS = f"""
    SELECT * FROM ({unpacked_transitions(f"?1 - {ROW_LENGTH - 1}", "?2")}) WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq"""
_OF_METRICS = """
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
    WHERE packed.id <= ?2 AND (?3 IS NULL OR scopes.name = ?3) AND (?4 IS NULL OR packed.epoch = ?4)"""
_METRICS = f"""
    SELECT packed.id, packed.attempt, attempts.kept_until, scopes.name, packed.epoch,
        seq, batch, step, time_ns, keyset, {", ".join(f"v{pos}" for pos in range(ROW_LENGTH))}
    FROM packed_metrics AS packed {_OF_METRICS} AND packed.id >= ?1"""
_METRIC_BLOCKS = f"""
    SELECT packed.id, packed.attempt, attempts.kept_until, scopes.name, packed.epoch,
        rows, seq, batch, step, time_ns, length, lead, span, record, data
    FROM metric_blocks AS packed {_OF_METRICS} AND packed.id > ?1 - {BLOCK_ROWS}"""

_ATTEMPT_COLUMNS = (
    "attempt, position, first_seq, started_ns, ended_ns, pid, host, process_started, end_state, outcome, "
    "reason, exception, command, params, versions, device, kept_until"
)
_CHECKPOINT_COLUMNS = (
    "id, name, attempt, seq, epoch, batch, state, size_bytes, time_ns, duration_ns, best, metrics, "
    "removed_ns, superseded"
)
_STATES = {state.value: state for state in State}
_TRIGGERS = {trigger.value: trigger for trigger in Trigger}


class Journal:
    """A run's journal, read-only. Every read is a short transaction of its own: no writer waits for it.

    Iterators read page by page: what is written meanwhile is part of what they yield. Use it in one thread
    at a time, and `close` it (or `with`).
    """

    def __init__(self, run: RunFolder, connection: Connection):
        self.run = run
        self._connection = connection
        self._attempt_rows: list[tuple[Any, ...]] = []
        self._attempts: list[Attempt] = []

    @classmethod
    def open(cls, run: RunFolder) -> "Journal":
        """Open the journal of a run; needs no right to write, where SQLite allows.

        Raises JournalError if there is none, JournalDamagedError if the file is no journal,
        JournalFormatError if a newer interlock wrote it.
        """
        return cls(run, connect_to_read(run.journal))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run_info(self) -> RunInfo:
        """Who this run is."""
        found = dict(self._all("SELECT key, value FROM run"))
        return RunInfo(
            found["id"], found["name"], int(found["created_ns"]), int(found["format"]), _parent(found)
        )

    def attempts(self) -> list[Attempt]:
        """The run's attempts, oldest first."""
        rows = self._all(f"SELECT {_ATTEMPT_COLUMNS} FROM attempts ORDER BY attempt")
        if rows != self._attempt_rows:  # the shipper asks again and again
            self._attempt_rows, self._attempts = rows, [_attempt(row) for row in rows]
        return list(self._attempts)

    def newest_seq(self) -> int:
        """The seq of the newest transition in the journal, superseded or not; 0 if there is none."""
        return int(self._all(NEWEST_SEQ)[0][0])

    def transitions(
        self,
        *,
        state: State | None = None,
        epoch: int | None = None,
        scope: str | None = None,
        after: int = 0,
        include_superseded: bool = False,
        live: bool = False,
    ) -> Iterator[Transition]:
        """Transitions with a seq greater than `after`, in the order of seq.

        `state` is the state reached. `live=True` goes on with those which are in the flight recorder only.
        What is of other epochs, or superseded, is not even read where it is not asked for.
        """
        wanted = _Wanted(state, epoch, scope, include_superseded)
        if epoch is not None or not include_superseded:
            newest, standing = self.newest_seq(), not include_superseded
            there = stretches(self._all, standing) if epoch is None else of_epoch(self._all, epoch, standing)
            for stretch in there:
                for found in self._journaled(max(after, stretch.first - 1), min(stretch.last, newest)):
                    if wanted.fits(found):
                        yield found
            after = max(after, newest)
        for found in self._journaled(after):
            after = found.seq
            if wanted.fits(found):
                yield found
        if live:
            # The recorder before the journal: what is drained in between is then found in the journal.
            view = self._recorder()
            for found in self._journaled(after):
                after = found.seq
                if wanted.fits(found):
                    yield found
            for found in self._recorded(view, after):
                if wanted.fits(found):
                    yield found

    def packed(self, *, live: bool = False) -> Iterator[Packed]:
        """All transitions, superseded or not, in the order of seq, as rows of several: for those who read millions.

        `live` as in `transitions`.
        """
        chains: dict[int, Chain] = {}
        after = 0
        while (newest := self.newest_seq()) > after:
            rows = self._all(_PACKED, after + 1, min(after + _MANY, newest))
            after = min(after + _MANY, newest)
            if any(row[5] not in chains for row in rows):
                chains = self._chains()
            for first, attempt, scope, epoch, batch, word, kept_until in rows:
                chain = chains.get(word)
                if chain is None:
                    continue
                last = first + chain.length - 1
                if kept_until is None or kept_until < first or last <= kept_until:
                    gone = kept_until is not None and kept_until < first
                    yield Packed(first, last, attempt, scope, epoch, batch, chain, gone)
                else:
                    stands, superseded = chain.cut(kept_until - first + 1)
                    yield Packed(first, kept_until, attempt, scope, epoch, batch, stands, False)
                    yield Packed(kept_until + 1, last, attempt, scope, epoch, batch, superseded, True)
        if live:
            for found in self.transitions(after=self.newest_seq(), include_superseded=True, live=True):
                place = (found.attempt, found.scope, found.epoch, found.batch)
                move = Chain([(found.trigger, found.source, found.dest)])
                yield Packed(found.seq, found.seq, *place, move, found.superseded)

    def _chains(self) -> dict[int, Chain]:
        found: dict[int, list[tuple[Trigger, State, State]]] = {}
        for word, trigger, source, dest in self._all(
            "SELECT word, trigger, source, dest FROM words ORDER BY word, pos"
        ):
            found.setdefault(word, []).append((_TRIGGERS[trigger], _STATES[source], _STATES[dest]))
        return {word: Chain(moves) for word, moves in found.items()}

    def last_transition(self, scope: str = TRAIN, *, live: bool = True) -> Transition | None:
        """The newest transition of `scope` that is not superseded; None if there is none. Takes no scan."""
        view = self._recorder(_NEWEST) if live else None
        if view is not None and not view.damaged and self._is_open(view.attempt):
            for record in reversed(view.records):
                if view.scopes[record.scope] == scope:
                    return _from_record(record, view)
        # The recorder first, then how far the journal goes: what is drained meanwhile is in the rows.
        view, drained = (self._recorder(_LATEST) if live else None), self.newest_seq()
        if view is not None and view.records and view.records[0].seq > drained + 1:
            view, drained = self._recorder(), self.newest_seq()  # a writer that is far behind
        standing = """packed.scope = (SELECT scope FROM scopes WHERE name = ?3)
            AND (attempts.kept_until IS NULL OR packed.seq <= attempts.kept_until)"""
        row = self._all(last_row("?1", "?2", standing), 1, drained, scope)
        first = row[0][0] if row else 1
        there = self._all(_TRANSITIONS, first, first + ROW_LENGTH - 1) if row else []
        newest = [
            found for found in map(_transition, there) if found.scope == scope and not found.superseded
        ][-1:]
        newest += [found for found in self._recorded(view, drained) if found.scope == scope]
        return max(newest, key=lambda found: found.seq, default=None)

    def newest(self, amount: int) -> list[Transition]:
        """The newest transitions of all scopes, at most `amount`, less those that are superseded, in the order of seq.

        Those in the flight recorder included. Takes as long for any run.
        """
        # The recorder first: what is drained meanwhile is in the journal.
        view = self._recorder(max(_LATEST, amount // STEPS_IN_A_FRAME))
        drained = self.newest_seq()
        found = list(self._journaled(max(0, drained - amount)))
        after = found[-1].seq if found else drained
        if view is not None and self._is_open(view.attempt):
            later = [_from_record(record, view) for record in view.records if record.seq > after]
            gap = bool(later) and later[0].seq != after + 1
            found = later if gap else [*found, *later]
        return [row for row in found if not row.superseded][-amount:]

    def standing(self) -> list[Stretch]:
        """What of each attempt stands now, oldest first."""
        return stretches(self._all, standing=True)

    def losses(
        self, after: int = 0, until: int | None = None, *, stands: Sequence[Stretch] | None = None
    ) -> Iterator[Loss]:
        """The losses of the training that stand, with after < seq <= until, in the order of seq.

        `stands`: what stood when `standing` was asked; now by default.

        Reads the journal only (`JournalWriter.sync` puts there what is in the recorder), page by page.
        """
        return losses_of(self._all, self.standing() if stands is None else stands, after, until)

    def find(
        self, epoch: int, batch: int | None, state: State, phase: str | None = None
    ) -> Transition | None:
        """The first transition of the training that stands and led to `state` at this epoch and batch.

        None for `batch` or `phase` means any. None is returned where there is no such transition in the
        journal; none leads to IDLE. Takes no scan: places in what stands go up with seq, so it bisects.
        """
        row = find_row(self._all, epoch, batch, state, phase)
        return _transition(row) if row else None

    def metrics(
        self,
        *,
        after: int = 0,
        scope: str | None = None,
        epoch: int | None = None,
        key: str | None = None,
        include_superseded: bool = False,
        limit: int | None = None,
    ) -> Iterator[Metric]:
        """Metric values with an id greater than `after`, in the order of id (which is that of insertion)."""
        found = self._metrics(after, scope, epoch, key, include_superseded)
        yield from found if limit is None else islice(found, limit)

    def _metrics(
        self, after: int, scope: str | None, epoch: int | None, key: str | None, include_superseded: bool
    ) -> Iterator[Metric]:
        for found in self.measured(after, scope, epoch, include_superseded=include_superseded):
            places = zip(found.ids, found.batches, found.steps, found.times_ns, *found.columns, strict=True)
            for first, batch, step, time_ns, *values in places:
                for number, own, value in zip(count(first), found.keys, values, strict=False):
                    if key is None or own == key:
                        yield Metric(
                            number, found.attempt, found.scope, found.epoch, batch, step, own, value, time_ns,
                            found.superseded,
                        )  # fmt: skip

    def measured(
        self,
        after: int = 0,
        scope: str | None = None,
        epoch: int | None = None,
        *,
        include_superseded: bool = False,
        page: int = _PAGE,
    ) -> Iterator[Measured]:
        """The same values by columns, in the order of id. No more than `page` batches are read at a time."""
        keysets: dict[int, tuple[str, ...]] = {}
        first = after // ROW_LENGTH  # that packed row may hold values beyond it
        while (newest := self.newest_metrics()) >= first:
            last = min(first + min(page, _PAGE) - 1, newest)
            rows = self._all(_METRICS, first, last, scope, epoch)
            blocks = self._all(_METRIC_BLOCKS, first, last, scope, epoch)
            in_order = _in_order(rows, blocks, first, last)
            for (attempt, name, in_epoch, keyset, gone, _), group in groupby(in_order, _alike):
                if gone and not include_superseded:
                    continue
                if keyset not in keysets:
                    keysets = self._keysets()
                if not (keys := keysets.get(keyset, ())):
                    continue
                packed, _, _, _, _, _, batches, steps, times_ns, _, *columns = zip(*group, strict=False)
                found = Measured(
                    attempt, name, in_epoch, gone, keys, tuple(ROW_LENGTH * row for row in packed),
                    batches, steps, times_ns,
                    tuple(tuple(map(float, column)) for column in columns[: len(keys)]),
                )  # fmt: skip
                yield from _beyond(found, after)
            first = last + 1

    def _keysets(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, tuple[str, ...]] = {}
        for keyset, key in self._all("SELECT keyset, key FROM keysets ORDER BY keyset, pos"):
            found[keyset] = (*found.get(keyset, ()), key)
        return found

    def newest_metrics(self) -> int:
        """The id of the newest packed row of metric values, superseded or not; 0 if there is none."""
        return int(self._all(NEWEST_METRICS)[0][0])

    def checkpoints(
        self, *, include_removed: bool = False, include_superseded: bool = False
    ) -> list[Checkpoint]:
        """The checkpoints that were made, oldest first."""
        rows = self._all(
            f"""SELECT {_CHECKPOINT_COLUMNS} FROM (
                    SELECT *, kept_until IS NOT NULL AND seq > kept_until AS superseded
                    FROM checkpoints JOIN attempts USING (attempt))
                WHERE (?1 OR removed_ns IS NULL) AND (?2 OR NOT superseded) ORDER BY id""",
            include_removed,
            include_superseded,
        )
        return [_checkpoint(row) for row in rows]

    def logs(self, *, after: int = 0) -> list[LogRecord]:
        """Messages with an id greater than `after`, oldest first."""
        return [
            LogRecord(*row)
            for row in self._all(
                "SELECT id, attempt, time_ns, level, message FROM logs WHERE id > ? ORDER BY id", after
            )
        ]

    def _all(self, sql: str, *arguments: object) -> list[Any]:
        self._connection.check_ours()
        try:
            return self._connection.execute(sql, arguments).fetchall()
        except sqlite3.Error as error:
            raise explained(self.run.journal, error) from error

    def _journaled(self, after: int, until: int | None = None) -> Iterator[Transition]:
        while (last := min(after + _PAGE, self.newest_seq() if until is None else until)) > after:
            for row in self._all(_TRANSITIONS, after + 1, last):
                yield _transition(row)
            after = last

    def _recorder(self, newest: int | None = None) -> RecorderView | None:
        if not self._all("SELECT 1 FROM attempts WHERE outcome IS NULL LIMIT 1"):
            return None  # all that it holds was taken into the journal when its attempt ended
        try:
            return read_recorder(self.run.recorder, newest)
        except (OSError, RecorderError):
            return None  # none yet, or none that can be read: then the journal is what there is

    def _is_open(self, attempt: int) -> bool:
        return bool(self._all("SELECT 1 FROM attempts WHERE attempt = ? AND outcome IS NULL", attempt))

    def _recorded(self, view: RecorderView | None, after: int) -> Iterator[Transition]:
        """What follows `after` in the recorder, if the recorder is that of the newest attempt, still open."""
        if view is None or not self._all(
            "SELECT 1 FROM attempts WHERE attempt = ? AND outcome IS NULL AND first_seq <= ? + 1",
            view.attempt,
            after,
        ):
            return
        for record in view.records:
            if record.seq == after + 1:
                after = record.seq
                yield _from_record(record, view)


def _parent(found: dict[str, str]) -> Parent | None:
    if "parent_run" not in found:
        return None
    seq = found.get("parent_seq")
    return Parent(
        found["parent_run"],
        found["parent_path"],
        None if seq is None else int(seq),
        found["parent_checkpoint"],
        "branch" if found["parent_kind"] == "branch" else "warm start",
    )


class _Wanted:
    """Which transitions a reader asked for; None: all."""

    def __init__(self, state: State | None, epoch: int | None, scope: str | None, superseded: bool):
        self._state, self._epoch, self._scope, self._superseded = state, epoch, scope, superseded

    def fits(self, found: Transition) -> bool:
        return (
            (self._superseded or not found.superseded)
            and (self._state is None or found.dest is self._state)
            and (self._epoch is None or found.epoch == self._epoch)
            and (self._scope is None or found.scope == self._scope)
        )


def _transition(row: tuple[Any, ...]) -> Transition:
    seq, attempt, scope, epoch, batch, phase, trigger, source, dest, time_ns, took_ns, loss, note, gone = row
    made = _TRIGGERS[trigger], _STATES[source], _STATES[dest], time_ns, took_ns
    return Transition(
        seq, attempt, scope, epoch, batch, phase, *made, to_number(loss), note or "", bool(gone)
    )


def _from_record(record: Record, view: RecorderView) -> Transition:
    trigger, source, dest = view.arcs[record.arc]
    nothing = is_pending(record.loss) or (record.loss != record.loss and record.arc not in view.forwards)
    return Transition(
        record.seq,
        view.attempt,
        view.scopes[record.scope],
        record.epoch,
        record.batch,
        view.phases[record.phase],
        _TRIGGERS[trigger],
        _STATES[source],
        _STATES[dest],
        record.time_ns,
        record.duration_ns,
        None if nothing else record.loss,
        record.note,
    )


def _alike(row: Any) -> tuple[int, str, int, int, bool, bool]:
    """Attempt, scope, epoch, keyset, whether it is superseded, and whether of an epoch, of a row of `_METRICS`."""
    return row[1], row[3], row[4], row[9], row[2] is not None and row[5] > row[2], row[6] < 0


def _in_order(rows: list[Any], blocks: list[Any], first: int, last: int) -> list[Any]:
    """`rows`, and those that stand in `blocks` with a number from `first` to `last`, in the order of their numbers."""
    pieces = [
        (packed, *block[1:5], *others, *values)
        for block in blocks
        for packed, *others, values in values_of((block[0], *block[5:]))
        if first <= packed <= last
    ]
    return sorted([*rows, *pieces], key=itemgetter(0))


def _beyond(found: Measured, after: int) -> Iterator[Measured]:
    """What of it has an id greater than `after`."""
    if found.ids[0] > after:
        yield found
        return
    passed = after + 1 - found.ids[0]
    if passed < len(found.keys):
        first = found.part(slice(1))
        yield replace(first, ids=(after + 1,), keys=first.keys[passed:], columns=first.columns[passed:])
    if len(found.ids) > 1:
        yield found.part(slice(1, None))


def _attempt(row: tuple[Any, ...]) -> Attempt:
    columns = dict(zip(_ATTEMPT_COLUMNS.split(", "), row, strict=True))
    for name in ("command", "params", "versions"):
        columns[name] = json.loads(columns[name])
    for name in ("reason", "exception"):
        columns[name] = columns[name] or ""
    if columns["end_state"]:
        columns["end_state"] = _STATES[columns["end_state"]]
    return Attempt(**columns)


def _checkpoint(row: tuple[Any, ...]) -> Checkpoint:
    columns = dict(zip(_CHECKPOINT_COLUMNS.split(", "), row, strict=True))
    columns["state"] = _STATES[columns["state"]]
    columns["metrics"] = {key: float(value) for key, value in json.loads(columns["metrics"]).items()}
    columns["best"], columns["superseded"] = bool(columns["best"]), bool(columns["superseded"])
    return Checkpoint(**columns)
