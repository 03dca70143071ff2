"""timeline.html: one page, complete in itself, that shows where the time of a run went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

from states.table import Trigger
from tracking.journal import Attempt, Journal
from tracking.packed import ROW_LENGTH, since_first, transitions_between
from tracking.runs import RunFolder
from tracking.schema import Connection, connect_to_read
from tracking.tally import BETWEEN, GONE, VALIDATION, Losses, Stretch, Tally, tally

__all__ = ["timeline_data", "write_timeline"]

_NEWEST, _FIRST = 12_000, 1_500  # packed rows, most of which are a batch each
_SLOWEST = 40  # of each trigger
_MOST_ATTEMPTS = 300
_LONGEST_TEXT = 300
_KINDS = [*(trigger.value for trigger in Trigger), VALIDATION, BETWEEN, GONE]

_ROWS = f"""
    SELECT packed.seq, packed.attempt, packed.scope, packed.word, packed.epoch, packed.batch, packed.time_ns,
        {", ".join(map(since_first, range(1, ROW_LENGTH)))},
        {", ".join(f"packed.d{pos}" for pos in range(ROW_LENGTH))}, packed.loss, packed.note
    FROM {transitions_between("?1", "?2")} AS packed ORDER BY packed.seq
"""
_LONG = frozenset({"seq", "word", *(f"d{pos}" for pos in range(ROW_LENGTH))})
_TIMES, _DURATIONS, _LOSS, _NOTE = 7, 6 + ROW_LENGTH, 6 + 2 * ROW_LENGTH, 7 + 2 * ROW_LENGTH


def write_timeline(
    run: RunFolder, file: Path, found: Tally | None = None, hide: Callable[[str], str] = str
) -> None:
    """Write the page of `run`; `found` is its tally where that was made already. Raises JournalError, OSError.

    Notes and reasons are shown as `hide` gives them: secrets stay here.
    """
    page = (files("tracking") / "timeline.html").read_text(encoding="utf-8")
    data = json.dumps(timeline_data(run, found, hide), separators=(",", ":"), allow_nan=False)
    # Within a script element nothing but its end tag and a comment's beginning mean anything.
    data = data.replace("<", "\\u003c")
    file.write_text(page.replace("/*DATA*/null", data), encoding="utf-8")


def timeline_data(
    run: RunFolder, found: Tally | None = None, hide: Callable[[str], str] = str
) -> dict[str, Any]:
    """What the page shows, JSON-able. Times are nanoseconds from `base_ns`; epochs and batches count from 0.

    Everything is in the totals, the epochs and the stretches. Single transitions, in `rows`, are the newest 12,000
    batches or so, the first 1,500, and of each trigger the slowest of the stretches where it was slowest.
    """
    found = found or tally(run)
    with Journal.open(run) as journal, closing(connect_to_read(run.journal)) as connection:
        info, attempts = journal.run_info(), journal.attempts()
        last = journal.last_transition()
        base = min((s.start_ns for s in found.stretches), default=info.created_ns)
        rows, words = _rows(connection, found), _words(connection)
        return {
            "format": 1,
            "run": {"id": info.id, "name": info.name, "parent": info.parent.run if info.parent else None},
            "made_ms": time.time_ns() // 1_000_000,
            "base_ns": str(base),
            "state": last.dest.value if last else None,
            "newest_seq": found.newest_seq,
            "attempts": [_attempt(attempt, base, hide) for attempt in attempts[-_MOST_ATTEMPTS:]],
            "attempts_before": max(0, len(attempts) - _MOST_ATTEMPTS),
            "kinds": _KINDS,
            "totals": [
                [scope, arc.trigger.value, arc.source.value, arc.dest.value, phase, t.count, t.ns, t.most_ns]
                for (scope, arc, phase), t in found.totals.items()
            ],
            "superseded": [found.gone.count, found.gone.ns],
            "epochs": [[e.first, e.last, e.batches, _by_kind(e.ns), _losses(e.losses)] for e in found.epochs],
            "stretches": [_stretch(s, base) for s in found.stretches],
            "scopes": dict(connection.execute("SELECT scope, name FROM scopes").fetchall()),
            "words": words,
            "rows": _columns(rows, {word: len(pattern) for word, pattern in words.items()}, base, hide),
            "complete": _complete(connection, found, len(rows)),
        }


def _attempt(attempt: Attempt, base: int, hide: Callable[[str], str]) -> dict[str, Any]:
    return {
        "attempt": attempt.attempt,
        "first_seq": attempt.first_seq,
        "kept_until": attempt.kept_until,
        "start": attempt.started_ns - base,
        "end": None if attempt.ended_ns is None else attempt.ended_ns - base,
        "outcome": attempt.outcome,
        "state": attempt.end_state.value if attempt.end_state else None,
        "reason": _cut(hide(attempt.reason)),
        "host": attempt.host,
        "device": attempt.device,
    }


def _by_kind(ns: Mapping[str, int]) -> list[int]:
    return [ns.get(kind, 0) for kind in _KINDS]


def _losses(losses: Losses) -> list[float | int] | None:
    """Mean, least, most, how many are not finite; None without any."""
    if not losses.count:
        return [0, 0, 0, losses.nonfinite] if losses.nonfinite else None
    return [
        *(_short(x) for x in (losses.sum / losses.count, losses.least, losses.most)),
        losses.nonfinite,
    ]


def _short(loss: float) -> float:
    return float(f"{loss:.5g}")


def _stretch(stretch: Stretch, base: int) -> list[Any]:
    return [
        stretch.attempt,
        stretch.first_seq,
        stretch.start_ns - base,
        stretch.end_ns - base,
        stretch.first_epoch,
        stretch.last_epoch,
        _by_kind(stretch.ns),
        {phase: shown for phase, losses in stretch.losses.items() if (shown := _losses(losses))},
    ]


def _words(connection: Connection) -> dict[int, list[list[Any]]]:
    """Of each word the trigger, the states and the phase of each transition, and whether it has the loss."""
    words: dict[int, list[list[Any]]] = {}
    for word, *pattern in connection.execute(
        "SELECT word, trigger, source, dest, phase, loss FROM words ORDER BY word, pos"
    ):
        words.setdefault(word, []).append(pattern)
    return words


# -- single transitions ----------------------------------------------------------------------------------------


def _rows(connection: Connection, found: Tally) -> list[Sequence[Any]]:
    """The packed rows that are kept in full, in the order of seq."""
    end = found.newest_seq + 1
    kept: dict[int, Sequence[Any]] = {}

    def keep(rows: Iterable[Sequence[Any]]) -> None:
        kept.update((row[0], row) for row in rows)

    keep(_from_to(connection, end - _NEWEST * ROW_LENGTH, end - 1)[-_NEWEST:])
    oldest = min(kept, default=end)
    keep(_from_to(connection, 1, min(_FIRST * ROW_LENGTH, oldest - 1))[:_FIRST])
    if len(kept) >= _NEWEST + _FIRST:
        for seq in found.events:
            keep(_around(connection, seq))
        for seq in _slowest(connection, found):
            keep(_around(connection, seq))
    return [kept[seq] for seq in sorted(kept)]


def _around(connection: Connection, seq: int) -> list[Sequence[Any]]:
    """The packed row that begins at `seq`, the one before and the one after."""
    before = _from_to(connection, seq - ROW_LENGTH, seq - 1)[-1:]
    return before + _from_to(connection, seq, seq + ROW_LENGTH)[:2]


def _from_to(connection: Connection, first: int, last: int) -> list[Sequence[Any]]:
    """The packed rows that begin from `first` to `last`."""
    return connection.execute(_ROWS, (first, last)).fetchall()


def _slowest(connection: Connection, found: Tally) -> list[int]:
    """The packed rows that hold the slowest transition of each trigger, one for each of the slowest stretches."""
    ends = {
        s.first_seq: later.first_seq for s, later in zip(found.stretches, found.stretches[1:], strict=False)
    }
    seqs = []
    for trigger in Trigger:
        slow = [s for s in found.stretches if s.slowest.get(trigger.value)]
        slow.sort(key=lambda s: -s.slowest[trigger.value])
        for stretch in slow[:_SLOWEST]:
            end = ends.get(stretch.first_seq, found.newest_seq + 1)
            end = end if end > stretch.first_seq else found.newest_seq + 1
            rows = connection.execute(
                f"""SELECT packed.seq FROM {transitions_between("?1", "?2", _LONG)} AS packed JOIN words USING (word)
                    WHERE trigger = ?3
                        AND CASE pos {" ".join(f"WHEN {pos} THEN d{pos}" for pos in range(ROW_LENGTH))} END = ?4
                    ORDER BY packed.seq LIMIT 1""",
                (stretch.first_seq, end - 1, trigger.value, stretch.slowest[trigger.value]),
            )
            seqs += [seq for (seq,) in rows]
    return seqs


def _columns(
    rows: list[Sequence[Any]], lengths: Mapping[int, int], base: int, hide: Callable[[str], str]
) -> dict[str, Any]:
    """The rows by columns, most of them as differences from the row before, which are short; `lengths` are the words'.

    `d` has the durations of all rows in a row, `gaps` the nanoseconds between two transitions of one row where there
    are any, as [row, position, nanoseconds].
    """
    columns: dict[str, Any] = {
        name: [] for name in ("seq", "attempt", "scope", "word", "epoch", "batch", "t", "d", "loss")
    }
    columns |= {"gaps": [], "notes": {}}
    before = [0, 0, 0, 0, 0, 0, base]
    for number, row in enumerate(rows):
        for name, value, earlier in zip(
            ("seq", "attempt", "scope", "word", "epoch", "batch", "t"), row, before, strict=False
        ):
            columns[name].append(value - earlier)
        before = list(row[:_TIMES])
        ends = [0, *row[_TIMES:_DURATIONS]]
        for pos, duration in enumerate(row[_DURATIONS:_LOSS][: lengths[row[3]]]):
            columns["d"].append(duration)
            if pos and (gap := ends[pos] - ends[pos - 1] - duration):
                columns["gaps"].append([number, pos, gap])
        columns["loss"].append(_loss(row[_LOSS]))
        if row[_NOTE]:
            columns["notes"][number] = _cut(hide(row[_NOTE]))
    return columns


def _loss(stored: float | str | None) -> float | str | None:
    if stored is None:
        return None
    value = float(stored)
    return _short(value) if value - value == 0 else str(value)


def _complete(connection: Connection, found: Tally, kept: int) -> bool:
    """Are all transitions there one by one?"""
    if kept < _NEWEST + _FIRST:
        return True
    counted = connection.execute(
        """SELECT (SELECT count(*) FROM packed_transitions WHERE seq <= ?1)
            + (SELECT coalesce(sum(rows), 0) FROM transition_blocks WHERE seq <= ?1)""",
        (found.newest_seq,),
    ).fetchone()
    return bool(counted[0] == kept)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
