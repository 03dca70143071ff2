"""Packed rows: transitions and metrics as the journal stores them, written in the caller's transaction."""

import math
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from states.table import Trigger
from tracking.recorder import Chunk, Slot, is_pending

__all__ = ["ROW_LENGTH", "MetricValues", "Packer", "from_number", "to_number"]

ROW_LENGTH = 8
"""Most transitions, and most metric values, in one packed row."""

_INSERT_TRANSITIONS = f"INSERT INTO packed_transitions VALUES ({', '.join('?' * 24)})"
_INSERT_METRICS = f"INSERT INTO packed_metrics VALUES (NULL, {', '.join('?' * 16)})"
_NONE = (None,) * ROW_LENGTH

Pattern = tuple[tuple[str, str, str, str, bool], ...]  # (trigger, source, dest, phase, carries the loss)
SqlNumber = float | str | None


def from_number(value: float) -> float | str:
    """A float as SQLite can hold it: NaN, which SQLite would turn into NULL, becomes the text 'nan'."""
    return "nan" if math.isnan(value) else value


def to_number(stored: SqlNumber) -> float | None:
    """The float that `from_number` was given; None for NULL."""
    return stored if stored is None else float(stored)


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
        self._connection.executemany(_INSERT_TRANSITIONS, self._rows(chunk))

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
                        *_NONE[len(part) :],
                    )
                )
        self._connection.executemany(_INSERT_METRICS, rows)

    def late_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of a `forward` that is in the journal already; nothing if `seq` is none."""
        self._connection.execute(
            """UPDATE packed_transitions SET loss = ?1
               WHERE seq = (SELECT max(seq) FROM packed_transitions WHERE seq <= ?2)
               AND EXISTS (SELECT 1 FROM words WHERE words.word = packed_transitions.word
                           AND words.pos = ?2 - packed_transitions.seq AND words.loss)""",
            (from_number(loss), seq),
        )

    def _rows(self, chunk: Chunk) -> list[tuple[object, ...]]:
        """Cut the transitions into rows: see the module's `schema` for what may share one."""
        rows: list[tuple[object, ...]] = []
        group: list[Slot] = []
        forwards, notes = self._forwards, chunk.notes
        scope = epoch = batch = expected = loss_at = -1
        for slot in chunk.slots:
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

    def _row(self, group: list[Slot], loss_at: int, note: str | None) -> tuple[object, ...]:
        seqs, arcs, scopes, phases, _, _, epochs, batches, times, durations, losses = zip(*group, strict=True)
        key = (arcs, phases, loss_at)
        word = self._words.get(key)
        if word is None:
            word = self._words[key] = self._word(arcs, phases, loss_at)
        first = times[0]
        loss: SqlNumber = None
        if loss_at >= 0:
            value = losses[loss_at]
            loss = value if value == value else None if is_pending(value) else "nan"
        missing = _NONE[len(seqs) :]
        return (
            seqs[0],
            self._attempt,
            self._scopes[scopes[0]],
            word,
            epochs[0],
            batches[0],
            first,
            *[time - first for time in times[1:]],
            *missing,
            *durations,
            *missing,
            loss,
            note,
        )

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
