"""Packed rows: transitions and metrics as the journal stores them, written in the caller's transaction."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby, repeat
from typing import TYPE_CHECKING, NamedTuple

from states.table import Trigger
from tracking.recorder import Chunk, Slot, is_pending

if TYPE_CHECKING:
    from tracking.blocks import Block

__all__ = ["ROW_LENGTH", "MetricValues", "Packer", "from_number", "to_number"]

ROW_LENGTH = 8
"""Most transitions, and most metric values, in one packed row."""

# Columns that are NULL are left out: sqlite3 binds a None five times as slowly as a number.
_PLACE = ("seq", "attempt", "scope", "word", "epoch", "batch", "time_ns")
_MEASURED = ("attempt", "seq", "scope", "epoch", "batch", "step", "keyset", "time_ns")

Pattern = tuple[tuple[str, str, str, str, bool], ...]  # (trigger, source, dest, phase, carries the loss)
SqlNumber = float | str | None


def from_number(value: float) -> float | str:
    """A float as SQLite can hold it: NaN, which SQLite would turn into NULL, becomes the text 'nan'."""
    return "nan" if math.isnan(value) else value


def to_number(stored: SqlNumber) -> float | None:
    """The float that `from_number` was given; None for NULL."""
    return stored if stored is None else float(stored)


_Row = list[tuple[str, object]]
_MANY = 64 * 64  # bytes: fewer slots are written one by one


def _times(length: int) -> list[str]:
    return [f"t{at}" for at in range(1, length)]


def _durations(length: int) -> list[str]:
    return [f"d{at}" for at in range(length)]


def _stored(loss: float) -> SqlNumber:
    return loss if loss == loss else None if is_pending(loss) else "nan"


@cache
def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


class MetricValues(NamedTuple):
    """What was measured at one moment; `seq` is the transition whose work measured it."""

    seq: int
    scope: str
    epoch: int
    batch: int
    step: int
    keys: tuple[str, ...]
    values: tuple[float, ...]
    time_ns: int


class Packer:
    """Packs the rows of one attempt. Begins and ends no transaction.

    Its memory of words, keysets and scopes is that of the connection's transaction: after a rollback make a
    new one. `arcs`, `scopes` and `phases` are the recorder's lists.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        attempt: int,
        arcs: Sequence[tuple[str, str, str]],
        scopes: Sequence[str],
        phases: Sequence[str],
    ):
        self._connection = connection
        self._attempt = attempt
        self._arcs = arcs
        self._phases = phases
        self._forwards = frozenset(code for code, arc in enumerate(arcs) if arc[0] == Trigger.FORWARD.value)
        self._scope_ids: dict[str, int] = {
            name: scope for scope, name in connection.execute("SELECT scope, name FROM scopes")
        }
        self._scopes = [self.scope(name) for name in scopes]
        self._patterns = self._stored_patterns()
        self._words: dict[tuple[tuple[int, ...], tuple[int, ...], int], int] = {}
        self._keysets = self._stored_keysets()

    def scope(self, name: str) -> int:
        """The number of a scope, given to it now if it has none."""
        found = self._scope_ids.get(name)
        if found is None:
            found = self._connection.execute("INSERT INTO scopes (name) VALUES (?)", (name,)).lastrowid
            assert found is not None
            self._scope_ids[name] = found
        return found

    def transitions(self, chunk: Chunk) -> None:
        """Write the transitions of a chunk."""
        if len(chunk.data) < _MANY or chunk.noted:
            self.slots(chunk.slots, chunk.notes)
            return
        from tracking.blocks import blocks  # numpy is not for those who only look on

        found, rest = blocks(chunk.data, self._forwards, ROW_LENGTH)
        for block in found:
            self._block(block)
        self.slots(rest, {})

    def slots(self, slots: Iterable[Slot], notes: Mapping[int, str]) -> None:
        """Write transitions, one by one."""
        for row in self._rows(slots, notes):
            columns = tuple(name for name, value in row if value is not None)
            self._connection.execute(
                _insert("packed_transitions", columns), [value for _, value in row if value is not None]
            )

    def _block(self, block: Block) -> None:
        count = len(block.seq)
        columns = [*_PLACE, *_times(len(block.arcs)), *_durations(len(block.arcs))]
        values: list[Iterable[object]] = [
            block.seq,
            repeat(self._attempt, count),
            (self._scopes[scope] for scope in block.scope),
            repeat(self._word_of(block.arcs, block.phases, block.loss_at), count),
            block.epoch,
            block.batch,
            block.time_ns,
            *block.later,
            *block.durations,
        ]
        if block.loss_at >= 0:
            columns.append("loss")
            values.append(map(_stored, block.loss))
        self._connection.executemany(_insert("packed_transitions", tuple(columns)), zip(*values, strict=True))

    def metrics(self, measured: Iterable[MetricValues]) -> None:
        """Write metric values."""
        rows = []
        for seq, scope, epoch, batch, step, keys, values, time_ns in measured:
            for at in range(0, len(keys), ROW_LENGTH):
                part = values[at : at + ROW_LENGTH]
                rows.append(
                    (
                        self._attempt,
                        seq,
                        self.scope(scope),
                        epoch,
                        batch,
                        step,
                        self._keyset(keys[at : at + ROW_LENGTH]),
                        time_ns,
                        *(value if value == value else "nan" for value in part),
                    )
                )
        for length, alike in groupby(rows, len):  # their order is that of their ids
            columns = (*_MEASURED, *(f"v{at}" for at in range(length - len(_MEASURED))))
            self._connection.executemany(_insert("packed_metrics", columns), alike)

    def late_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of a `forward` that is in the journal already; nothing if `seq` is none."""
        self._connection.execute(
            """UPDATE packed_transitions SET loss = ?1
               WHERE seq = (SELECT max(seq) FROM packed_transitions WHERE seq <= ?2)
               AND EXISTS (SELECT 1 FROM words WHERE words.word = packed_transitions.word
                           AND words.pos = ?2 - packed_transitions.seq AND words.loss)""",
            (from_number(loss), seq),
        )

    def _rows(self, slots: Iterable[Slot], notes: Mapping[int, str]) -> list[_Row]:
        """Cut the transitions into rows: see the module's `schema` for what may share one."""
        rows: list[_Row] = []
        group: list[Slot] = []
        forwards = self._forwards
        scope = epoch = batch = expected = loss_at = -1
        for slot in slots:
            loss = slot[10]
            carries = slot[1] in forwards or loss == loss
            if group and (
                slot[7] != batch
                or slot[2] != scope
                or slot[6] != epoch
                or slot[0] != expected
                or len(group) == ROW_LENGTH
                or (carries and loss_at >= 0)
            ):
                rows.append(self._row(group, loss_at, None))
                group = []
            if not group:
                scope, epoch, batch, loss_at = slot[2], slot[6], slot[7], -1
            if carries:
                loss_at = len(group)
            group.append(slot)
            expected = slot[0] + 1
            if notes and slot[0] in notes:
                rows.append(self._row(group, loss_at, notes[slot[0]]))
                group = []
        if group:
            rows.append(self._row(group, loss_at, None))
        return rows

    def _row(self, group: list[Slot], loss_at: int, note: str | None) -> _Row:
        seqs, arcs, scopes, phases, _, _, epochs, batches, times, durations, losses = zip(*group, strict=True)
        loss = _stored(losses[loss_at]) if loss_at >= 0 else None
        word = self._word_of(arcs, phases, loss_at)
        place = (seqs[0], self._attempt, self._scopes[scopes[0]], word, epochs[0], batches[0], times[0])
        return [
            *zip(_PLACE, place, strict=True),
            *zip(_times(len(seqs)), (time - times[0] for time in times[1:]), strict=True),
            *zip(_durations(len(seqs)), durations, strict=True),
            ("loss", loss),
            ("note", note),
        ]

    def _word_of(self, arcs: tuple[int, ...], phases: tuple[int, ...], loss_at: int) -> int:
        key = (arcs, phases, loss_at)
        word = self._words.get(key)
        if word is None:
            word = self._words[key] = self._word(arcs, phases, loss_at)
        return word

    def _word(self, arcs: tuple[int, ...], phases: tuple[int, ...], loss_at: int) -> int:
        pattern: Pattern = tuple(
            (*self._arcs[arc], self._phases[phase], pos == loss_at)
            for pos, (arc, phase) in enumerate(zip(arcs, phases, strict=True))
        )
        found = self._patterns.get(pattern)
        if found is None:
            found = self._patterns[pattern] = 1 + max(self._patterns.values(), default=0)
            self._connection.executemany(
                "INSERT INTO words VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(found, pos, *item, pos == len(pattern) - 1) for pos, item in enumerate(pattern)],
            )
        return found

    def _keyset(self, keys: tuple[str, ...]) -> int:
        found = self._keysets.get(keys)
        if found is None:
            found = self._keysets[keys] = 1 + max(self._keysets.values(), default=0)
            self._connection.executemany(
                "INSERT INTO keysets VALUES (?, ?, ?)", [(found, pos, key) for pos, key in enumerate(keys)]
            )
        return found

    def _stored_patterns(self) -> dict[Pattern, int]:
        items: dict[int, list[tuple[str, str, str, str, bool]]] = {}
        for word, trigger, source, dest, phase, loss in self._connection.execute(
            "SELECT word, trigger, source, dest, phase, loss FROM words ORDER BY word, pos"
        ):
            items.setdefault(word, []).append((trigger, source, dest, phase, bool(loss)))
        return {tuple(pattern): word for word, pattern in items.items()}

    def _stored_keysets(self) -> dict[tuple[str, ...], int]:
        items: dict[int, list[str]] = {}
        for keyset, key in self._connection.execute("SELECT keyset, key FROM keysets ORDER BY keyset, pos"):
            items.setdefault(keyset, []).append(key)
        return {tuple(keys): keyset for keyset, keys in items.items()}
