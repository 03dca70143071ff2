"""Packed rows: transitions and metrics as the journal stores them, written in the caller's transaction."""

from __future__ import annotations

import math
import sqlite3
import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter, sub

from states.table import Trigger
from tracking import packed
from tracking.frames import (
    BEGAN,
    FRAME,
    LOSS,
    NS,
    SIZE,
    STEPS,
    TAGS,
    Record,
    arcs_of,
    decode,
    duration,
    is_pending,
    is_text,
    phase_of,
    scope_of,
    tags_of,
    texts_after,
)
from tracking.packed import (
    BATCH_DIGITS,
    EXPONENT_DIGITS,
    MANTISSA_DIGITS,
    NEWEST_METRICS,
    ROW_LENGTH,
    SEQ_DIGITS,
    WORD_DIGITS,
)
from tracking.recorder import Chunk
from tracking.values import ROW, VALUES_AT, Kind

__all__ = ["Packer", "from_number", "to_number"]

# Columns that are NULL are left out: sqlite3 binds a None five times as slowly as a number.
_PLACE = ("seq", "attempt", "scope", "word", "epoch", "batch", "time_ns")

Pattern = tuple[tuple[str, str, str, str, bool], ...]  # (trigger, source, dest, phase, carries the loss)
SqlNumber = float | str | None


def from_number(value: float) -> float | str:
    """A float as SQLite can hold it: NaN, which SQLite would turn into NULL, becomes the text 'nan'."""
    return "nan" if math.isnan(value) else value


def to_number(stored: SqlNumber) -> float | None:
    """The float that `from_number` was given; None for NULL."""
    return stored if stored is None else float(stored)


_Row = list[tuple[str, object]]
_MOST_BOUND = 999
"""Values that one statement binds: what every SQLite allows."""
_TOGETHER = 8
"""One statement writes a multiple of so many rows, or fewer: so there are few to be prepared, and kept."""

_kind_of_row = itemgetter(VALUES_AT - 1)


def _kind(frame: bytes) -> tuple[int, bytes]:
    """What frames that share a pattern have in common."""
    return tags_of(frame), arcs_of(frame)


def _durations(length: int) -> list[str]:
    return [f"d{at}" for at in range(length)]


def _stored(loss: float) -> SqlNumber:
    return loss if loss == loss else None if is_pending(loss) else "nan"


def _by_rows(columns: Sequence[Sequence[SqlNumber]]) -> list[SqlNumber]:
    """The values of `columns`, which are as long as each other, row after row."""
    width = len(columns)
    found: list[SqlNumber] = [None] * (width * len(columns[0]))
    for at, column in enumerate(columns):
        found[at::width] = column
    return found


def _insert(table: str, shared: Mapping[str, int], columns: Sequence[str], rows: int = 1) -> str:
    """A statement that binds `columns` alone: binding a value takes as long as much of the insertion."""
    row = f"({', '.join([*map(str, shared.values()), *'?' * len(columns)])})"
    return f"INSERT INTO {table} ({', '.join([*shared, *columns])}) VALUES {', '.join([row] * rows)}"


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
        self._newest_id: int | None = None

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
        data, done = chunk.data, 0
        if len(data) >= packed.LEAST_ROWS * SIZE:
            from tracking.blocks import Block, blocks  # numpy is not for those who only look on

            insert = _insert("transition_blocks", {}, ("attempt", *Block._fields))
            for first, beyond, found in blocks(data, chunk.skip, chunk.since_ns, self._pattern, self._scopes):
                self._frames(data[done * SIZE : first * SIZE], chunk.skip if not done else 0, chunk.since_ns)
                self._connection.executemany(insert, ((self._attempt, *block) for block in found))
                done = beyond
        self._frames(data[done * SIZE :], chunk.skip if not done else 0, chunk.since_ns)

    def _frames(self, data: bytes, skip: int, since_ns: int) -> None:
        """Write what frames hold, those alike together; the first `skip` transitions of the first were taken before."""
        others: list[Record] = []
        if skip and data:
            beyond = (1 + texts_after(tags_of(data))) * SIZE
            others += next(decode(data[:beyond], self._forwards, since_ns))[0][skip:]
            data = data[beyond:]
        alike: dict[tuple[int, int, bytes], list[SqlNumber]] = {}
        patterns: dict[tuple[int, int, bytes], tuple[int, int, bool]] = {}
        at = 0
        frames = (data[begin : begin + SIZE] for begin in range(0, len(data), SIZE))
        for (tags, arcs), run in groupby(frames, _kind):
            rows = [FRAME.unpack(frame) for frame in run]
            at += len(rows)
            if is_text(tags):
                continue
            if noted := texts_after(tags):  # its text is the next run, so that it is the only one of its own
                of_one = data[(at - 1) * SIZE : (at + noted) * SIZE]
                others += next(decode(of_one, self._forwards, since_ns))[0]
                continue
            phase = phase_of(tags)
            kind = scope_of(tags), phase, arcs
            if kind not in alike:
                alike[kind], patterns[kind] = [], self._pattern(arcs, phase)
            _, length, carries = patterns[kind]
            columns = list(zip(*rows, strict=True))
            times = [[word & NS for word in column] for column in columns[STEPS : STEPS + length]]
            losses = columns[LOSS]
            # A sum is NaN where one is, or where infinities cancel out.
            if carries and (total := sum(losses)) != total:
                losses = tuple(map(_stored, losses))
            durations = [list(map(sub, after, before)) for before, after in pairwise(times)]
            first = list(map(duration, columns[STEPS], columns[BEGAN]))
            place = [*columns[:TAGS], [since_ns + ns for ns in times[0]], first]
            alike[kind] += _by_rows([*place, *durations, *[losses] * carries])
        for kind, values in alike.items():
            word, length, carries = patterns[kind]
            shared = {"attempt": self._attempt, "scope": self._scopes[kind[0]], "word": word}
            names = ["seq", "epoch", "batch", "time_ns", *_durations(length), *["loss"] * carries]
            self._write("packed_transitions", shared, names, values)
        self.records(others)

    def _pattern(self, arcs: bytes, phase: int) -> tuple[int, int, bool]:
        """The word of a frame's arcs (see `arcs_of`), how many they are, and whether there is a loss among them."""
        found = tuple(arc - 1 for arc in arcs.rstrip(b"\0"))
        loss_at = next((at for at, arc in enumerate(found) if arc in self._forwards), -1)
        return self._word_of(found, (phase,) * len(found), loss_at), len(found), loss_at >= 0

    def records(self, records: Iterable[Record]) -> None:
        """Write transitions, one by one."""
        for row in self._rows(records):
            columns = tuple(name for name, value in row if value is not None)
            self._connection.execute(
                _insert("packed_transitions", {}, columns), [value for _, value in row if value is not None]
            )

    def _write(
        self, table: str, shared: Mapping[str, int], columns: Sequence[str], left: list[SqlNumber]
    ) -> None:
        """Insert rows of `columns`, whose values follow each other in `left`.

        For each statement the training's thread is asked for the interpreter's lock.
        """
        width = len(columns)
        most = _MOST_BOUND // width // _TOGETHER * _TOGETHER
        while left:
            rows = len(left) // width
            together = min(rows // _TOGETHER * _TOGETHER or rows, most)
            some, left = left[: together * width], left[together * width :]
            self._connection.execute(_insert(table, shared, columns, together), some)

    def metrics(self, rows: bytes, kinds: Sequence[Kind]) -> None:
        """Write rows of values (see `tracking.values`), which are of `kinds`."""
        done = 0
        if len(rows) >= packed.LEAST_ROWS * ROW.size:
            from tracking.blocks import MetricBlock, metric_blocks

            insert = _insert("metric_blocks", {}, ("attempt", "id", *MetricBlock._fields))
            for first, beyond, found in metric_blocks(rows, kinds, self.scope, self._keyset):
                # In their order, which is that of the ids.
                self._one_by_one(rows[done * ROW.size : first * ROW.size], kinds)
                with_ids = ((self._attempt, self._next_id(block.rows), *block) for block in found)
                self._connection.executemany(insert, with_ids)
                done = beyond
        self._one_by_one(rows[done * ROW.size :], kinds)

    def _one_by_one(self, rows: bytes, kinds: Sequence[Kind]) -> None:
        for number, alike in groupby(ROW.iter_unpack(rows), _kind_of_row):
            scope, keys, _ = kinds[number]
            shared = {"attempt": self._attempt, "scope": self.scope(scope), "keyset": self._keyset(keys)}
            names = ("id", "seq", "epoch", "batch", "step", "time_ns", *(f"v{at}" for at in range(len(keys))))
            columns = list(zip(*alike, strict=True))
            place, values = columns[: VALUES_AT - 1], columns[VALUES_AT : VALUES_AT + len(keys)]
            if (total := sum(map(sum, values))) != total:  # as one is NaN, or infinities cancel out
                values = [tuple(map(from_number, column)) for column in values]
            first = self._next_id(len(columns[0]))
            ids = range(first, first + len(columns[0]))
            self._write("packed_metrics", shared, names, _by_rows([ids, *place, *values]))

    def _next_id(self, rows: int = 1) -> int:
        """The first of the ids of so many packed rows of values."""
        if self._newest_id is None:
            self._newest_id = int(self._connection.execute(NEWEST_METRICS).fetchone()[0])
        self._newest_id += rows
        return self._newest_id - rows + 1

    def late_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of a `forward` that is in the journal already; nothing if `seq` is none."""
        self._connection.execute(
            """UPDATE packed_transitions SET loss = ?1
               WHERE seq = (SELECT max(seq) FROM packed_transitions WHERE seq <= ?2)
               AND EXISTS (SELECT 1 FROM words WHERE words.word = packed_transitions.word
                           AND words.pos = ?2 - packed_transitions.seq AND words.loss)""",
            (from_number(loss), seq),
        )
        self._late_in_block(seq, loss)

    def _late_in_block(self, seq: int, loss: float) -> None:
        block = self._connection.execute(
            """SELECT seq, record, lead, data FROM transition_blocks
               WHERE seq = (SELECT max(seq) FROM transition_blocks WHERE seq <= ?1) AND last >= ?1""",
            (seq,),
        ).fetchone()
        if block is None:
            return
        first, record, lead, data = block
        since = [int(data[at + lead : at + lead + SEQ_DIGITS]) for at in range(0, len(data), record)]
        row = bisect_right(since, seq - first) - 1
        at = row * record + lead + SEQ_DIGITS + BATCH_DIGITS
        word, pos = int(data[at : at + WORD_DIGITS]), seq - first - since[row]
        if not self._connection.execute(
            "SELECT 1 FROM words WHERE word = ? AND pos = ? AND loss", (word, pos)
        ).fetchone():
            return
        (bits,) = struct.unpack("<Q", struct.pack("<d", loss))
        end = (row + 1) * record
        digits = b"%0*d%0*d" % (EXPONENT_DIGITS, bits >> 52, MANTISSA_DIGITS, bits & (1 << 52) - 1)
        self._connection.execute(
            "UPDATE transition_blocks SET data = ? WHERE seq = ?",
            (data[: end - len(digits)] + digits + data[end:], first),
        )

    def _rows(self, records: Iterable[Record]) -> list[_Row]:
        """Cut the transitions into rows: see the module's `schema` for what may share one."""
        rows: list[_Row] = []
        group: list[Record] = []
        loss_at = -1
        for record in records:
            carries = record.arc in self._forwards
            if group and (
                record.batch != group[0].batch
                or record.scope != group[0].scope
                or record.epoch != group[0].epoch
                or record.seq != group[-1].seq + 1
                or record.time_ns - record.duration_ns != group[-1].time_ns
                or record.note
                or group[-1].note
                or len(group) == ROW_LENGTH
                or (carries and loss_at >= 0)
            ):
                rows.append(self._row(group, loss_at))
                group, loss_at = [], -1
            if carries:
                loss_at = len(group)
            group.append(record)
        if group:
            rows.append(self._row(group, loss_at))
        return rows

    def _row(self, group: list[Record], loss_at: int) -> _Row:
        first = group[0]
        word = self._word_of(
            tuple(record.arc for record in group), tuple(record.phase for record in group), loss_at
        )
        scope = self._scopes[first.scope]
        place = (first.seq, self._attempt, scope, word, first.epoch, first.batch, first.time_ns)
        return [
            *zip(_PLACE, place, strict=True),
            *zip(_durations(len(group)), (record.duration_ns for record in group), strict=True),
            ("loss", _stored(group[loss_at].loss) if loss_at >= 0 else None),
            ("note", group[-1].note or None),
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
