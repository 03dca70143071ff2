"""Finding places in a long journal without reading all of it: what stands, where a state was reached, losses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from states.table import State, Trigger
from tracking.packed import NEWEST_SEQ, ROW_LENGTH, last_row, transitions_between, unpacked_transitions
from tracking.packing import to_number
from tracking.rows import TRAIN, Loss

__all__ = ["LOSSES_AT_ONCE", "Query", "Stretch", "find_row", "losses_of", "of_epoch", "stretches"]

Query = Callable[..., list[Any]]
"""Runs an SQL statement with its arguments in a read transaction of its own; the rows."""

LOSSES_AT_ONCE = 4096
"""How many are read in a transaction, or a few more: short ones let the writer's WAL be emptied."""

_AT_THE_END = frozenset({State.EPOCH_END, State.DONE})

_READ = frozenset({"seq", "scope", "word", "epoch", "batch", "loss"})
_LOSSES = f"""
    SELECT packed.seq + pattern.pos, packed.epoch, packed.batch, pattern.phase, packed.loss
    FROM {transitions_between(f"?3 - {ROW_LENGTH - 1}", "?4", _READ)} AS packed
        CROSS JOIN words AS pattern ON pattern.word = packed.word AND pattern.loss AND pattern.trigger = ?1
    WHERE packed.scope = ?2 AND packed.seq + pattern.pos BETWEEN ?3 AND ?4
    ORDER BY packed.seq, pattern.pos"""
_LAST = last_row("?1", "?2", "packed.scope = ?3", "epoch", "batch")


@dataclass(frozen=True)
class Stretch:
    """Transitions of one attempt: those from seq `first` to seq `last`."""

    first: int
    last: int


@dataclass(frozen=True, order=True)
class _Key:
    """A place in a training; in what stands of it, places never go back."""

    epoch: int
    batch: int


def losses_of(query: Query, stands: Sequence[Stretch], after: int, until: int | None) -> Iterator[Loss]:
    """What `Journal.losses` yields."""
    scope = _training(query)
    for stretch in stands:
        last = stretch.last if until is None else min(until, stretch.last)
        done = max(after, stretch.first - 1)
        while done < last:
            upto = min(done + LOSSES_AT_ONCE * ROW_LENGTH, last)
            for seq, epoch, batch, phase, loss in query(
                _LOSSES, Trigger.FORWARD.value, scope, done + 1, upto
            ):
                yield Loss(seq, epoch, batch, phase, loss if loss.__class__ is float else to_number(loss))
            done = upto


def find_row(
    query: Query, epoch: int, batch: int | None, state: State, phase: str | None
) -> tuple[Any, ...] | None:
    """The row of `UNPACKED_TRANSITIONS` that `Journal.find` is asked for."""
    search = _Search(query)
    beyond = search.first_from(_Key(epoch + 1, -1) if batch is None else _Key(epoch, batch + 1))
    if batch is None and state in _AT_THE_END:
        # An epoch's end is of its last batch, so that the others need not be read.
        last = search.at(beyond - 1)
        batch = last.batch if last else None
    first = search.first_from(_Key(epoch, -1 if batch is None else batch))
    found = query(
        f"""SELECT * FROM ({unpacked_transitions("?1", "?2")}
                WHERE packed.scope = ?3 AND packed.word IN (SELECT word FROM words WHERE dest = ?4)
                    AND (attempts.kept_until IS NULL OR packed.seq <= attempts.kept_until)
                    AND pattern.dest = ?4 AND (?5 IS NULL OR pattern.phase = ?5))
            WHERE NOT superseded ORDER BY seq LIMIT 1""",
        first,
        beyond - 1,
        search.scope,
        state.value,
        phase,
    )
    return found[0] if found else None


def of_epoch(query: Query, epoch: int, standing: bool) -> list[Stretch]:
    """Where the journal's transitions of an epoch are, oldest first, or those that stand; little else is there.

    Takes no scan: within an attempt the training's epochs go up with seq, so it bisects. A validation pass lies
    between transitions of the epoch that it belongs to, or at the end of its attempt.
    """
    scope = _training(query)

    def first_from(stretch: Stretch, epoch: int) -> int:
        low, high = stretch.first, stretch.last + 1
        while low < high:
            middle = (low + high) // 2
            rows = query(_LAST, stretch.first, middle, scope)
            if rows and rows[0][1] >= epoch:
                high = middle
            else:
                low = middle + 1
        return low

    found = []
    for attempt in stretches(query, standing):
        first, beyond = first_from(attempt, epoch), first_from(attempt, epoch + 1)
        if first < beyond:
            found.append(Stretch(first, beyond - 1))
    return found


class _Search:
    """Bisects what stands of the training, in which epochs and batches go up with seq."""

    def __init__(self, query: Query):
        self._query = query
        self._stretches = stretches(query, standing=True)
        self.scope = _training(query)

    def at(self, seq: int) -> _Key | None:
        """The place of the last packed row of the training that stands and begins at or before `seq`."""
        for stretch in reversed(self._stretches):
            if stretch.first <= seq:
                rows = self._query(_LAST, stretch.first, min(seq, stretch.last), self.scope)
                if rows:
                    return _Key(*rows[0][1:])
        return None

    def first_from(self, key: _Key) -> int:
        """The seq of the first packed row at or beyond `key`; one more than there are if there is none."""
        low = self._stretches[0].first if self._stretches else 1
        high = self._stretches[-1].last + 1 if self._stretches else 1
        while low < high:
            middle = (low + high) // 2
            found = self.at(middle)
            if found is not None and found >= key:
                high = middle
            else:
                low = middle + 1
        return low


def _training(query: Query) -> int:
    """The number of the training's scope; -1 where the journal has none yet."""
    rows = query("SELECT scope FROM scopes WHERE name = ?", TRAIN)
    return int(rows[0][0]) if rows else -1


def stretches(query: Query, standing: bool) -> list[Stretch]:
    """The stretches of the attempts, oldest first, or what stands of them; none is empty."""
    attempts = query("SELECT first_seq, kept_until FROM attempts ORDER BY attempt")
    begins = [*(first for first, _ in attempts), query(NEWEST_SEQ)[0][0] + 1]
    found = [
        Stretch(first, beyond - 1 if kept is None or not standing else min(beyond - 1, kept))
        for (first, kept), beyond in zip(attempts, begins[1:], strict=True)
    ]
    return [stretch for stretch in found if stretch.first <= stretch.last]
