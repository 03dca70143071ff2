"""Where a run's time went, added up from its journal in one pass of short reads, however long the run is."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from states.table import Arc, State, Trigger
from tracking.packed import NEWEST_SEQ, ROW_LENGTH, last_row, since_first, transitions_between
from tracking.rows import TRAIN
from tracking.runs import RunFolder
from tracking.schema import Connection, connect_to_read

__all__ = ["BETWEEN", "GONE", "VALIDATION", "Epochs", "Losses", "Stretch", "Tally", "Total", "tally"]

VALIDATION, BETWEEN, GONE = "validation", "between", "superseded"
"""What time is spent on besides triggers: passes over validation loaders (which happen in the work of an
`end_epoch` or `end_batch`), saves and other things between two transitions, and work that was done again."""

_MOST_STRETCHES = 600
_SHORTEST_STRETCH = 64
_MOST_EPOCHS = 400
_MOST_EVENTS = 1000

_LENGTHS = ", ".join(f"sum(packed.d{pos}), max(packed.d{pos})" for pos in range(ROW_LENGTH))
_LAST = f"packed.time_ns + coalesce({', '.join(map(since_first, range(ROW_LENGTH - 1, 0, -1)))}, 0)"
_FINITE = "typeof(packed.loss) = 'real' AND packed.loss - packed.loss = 0"
_GONE = "attempts.kept_until IS NOT NULL AND packed.seq > attempts.kept_until"

_GROUPS = f"""
    SELECT packed.attempt, scopes.name, CASE WHEN packed.epoch < 0 THEN -1 ELSE packed.epoch / ?3 END, packed.word,
        {_GONE}, count(*), min(packed.epoch), max(packed.epoch), min(packed.time_ns - packed.d0), max({_LAST}),
        sum(packed.loss) FILTER (WHERE {_FINITE}), count(*) FILTER (WHERE {_FINITE}),
        min(packed.loss) FILTER (WHERE {_FINITE}), max(packed.loss) FILTER (WHERE {_FINITE}),
        count(packed.loss) FILTER (WHERE NOT ({_FINITE})),
        {_LENGTHS}
    FROM {transitions_between("?1", "?2 - 1")} AS packed
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
    GROUP BY 1, 2, 3, 4, 5
"""
_BEFORE_LOSSES, _BEFORE_LENGTHS = 10, 15
_GONE_VALIDATION = "superseded validation"


@dataclass
class Total:
    """How often something was done, and for how many nanoseconds altogether and at most."""

    count: int = 0
    ns: int = 0
    most_ns: int = 0

    def add(self, count: int, ns: int, most_ns: int) -> None:
        """Some more of it."""
        self.count += count
        self.ns += ns
        self.most_ns = max(self.most_ns, most_ns)


@dataclass
class Losses:
    """Finite losses: their sum, number and bounds; and how many were not finite."""

    sum: float = 0.0
    count: int = 0
    least: float = float("inf")
    most: float = float("-inf")
    nonfinite: int = 0

    def add(self, sum_: float | None, count: int, least: float | None, most: float | None, odd: int) -> None:
        """Some more of them; None where there are none."""
        self.nonfinite += odd
        if count and sum_ is not None and least is not None and most is not None:
            self.sum, self.count = self.sum + sum_, self.count + count
            self.least, self.most = min(self.least, least), max(self.most, most)


@dataclass
class Stretch:
    """Consecutive transitions of one attempt: from when to when, in which epochs, where the time went.

    `ns` is by trigger, and by VALIDATION, BETWEEN and GONE; it adds up to the time from `start_ns` to `end_ns`.
    """

    attempt: int
    first_seq: int
    start_ns: int
    end_ns: int
    first_epoch: int
    last_epoch: int
    ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    slowest: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=lambda: defaultdict(Losses))
    """By phase."""


@dataclass
class Epochs:
    """One epoch, or a few consecutive ones: where the time of what stands of them went, and how many batches."""

    first: int
    last: int
    batches: int = 0
    ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    losses: Losses = field(default_factory=Losses)


@dataclass
class Tally:
    """A run's transitions up to `newest_seq`, added up. Superseded ones count in `gone` and stretches only.

    `totals` is by (scope, arc, phase). `events` are the seqs of packed rows with a halt, a resume, or a skipped step;
    of each sort at most the newest 1,000.
    """

    newest_seq: int
    totals: dict[tuple[str, Arc, str], Total]
    gone: Total
    stretches: list[Stretch]
    epochs: list[Epochs]
    events: list[int]

    def of_training(self) -> tuple[dict[Arc, int], dict[Arc, float]]:
        """How often each transition of the training was made, and its mean duration in nanoseconds."""
        found: dict[Arc, Total] = defaultdict(Total)
        for (scope, arc, _), total in self.totals.items():
            if scope == TRAIN:
                found[arc].add(total.count, total.ns, total.most_ns)
        return {arc: t.count for arc, t in found.items()}, {arc: t.ns / t.count for arc, t in found.items()}


def tally(run: RunFolder) -> Tally:
    """Add up the run's journal, as far as it is written now. Raises JournalError if it cannot be read."""
    with closing(connect_to_read(run.journal)) as connection:
        return _Adding(connection).all()


class _Adding:
    def __init__(self, connection: Connection):
        self._connection = connection
        self._end = connection.execute(NEWEST_SEQ).fetchone()[0] + 1
        self._words: dict[int, list[tuple[Arc, str]]] = defaultdict(list)
        for word, trigger, source, dest, phase in connection.execute(
            "SELECT word, trigger, source, dest, phase FROM words ORDER BY word, pos"
        ):
            self._words[word].append((Arc(Trigger(trigger), State(source), State(dest)), phase))
        self._per_column = 1 + self._highest_epoch() // _MOST_EPOCHS
        self._totals: dict[tuple[str, Arc, str], Total] = defaultdict(Total)
        self._gone = Total()
        self._columns: dict[int, Epochs] = {}
        self._stretches: list[Stretch] = []

    def all(self) -> Tally:
        length = max(_SHORTEST_STRETCH, -(-self._end // _MOST_STRETCHES))
        halts, skips = deque[int](maxlen=_MOST_EVENTS), deque[int](maxlen=_MOST_EVENTS)
        turning = {Trigger.HALT, Trigger.RESUME}
        marked = {
            word for word, arcs in self._words.items() if any(arc.trigger in turning for arc, _ in arcs)
        }
        for first in range(1, self._end, length):
            until = min(first + length, self._end)
            self._stretch(first, until)
            for seq, word in self._connection.execute(
                f"""SELECT seq, word FROM {transitions_between("?1", "?2", {"seq", "word", "note"})}
                    WHERE word IN ({",".join(map(str, marked)) or "NULL"}) OR note LIKE '%skipped%' ORDER BY seq""",
                (first, until - 1),
            ):
                (halts if word in marked else skips).append(seq)
        for row in self._cut_in_two():
            self._move(*row)
        self._set_validation_apart()
        for stretch in self._stretches:
            elapsed = stretch.end_ns - stretch.start_ns
            stretch.ns[BETWEEN] = max(0, elapsed - sum(stretch.ns.values()))
        return Tally(
            self._end - 1,
            dict(self._totals),
            self._gone,
            self._stretches,
            [self._columns[key] for key in sorted(self._columns)],
            sorted([*halts, *skips]),
        )

    def _highest_epoch(self) -> int:
        """Epochs go up within an attempt, so that only the ends of attempts need be looked at."""
        begins = [first for (first,) in self._connection.execute("SELECT first_seq FROM attempts").fetchall()]
        newest = last_row("1", "?1", "TRUE", "epoch")
        found = (self._connection.execute(newest, (end - 1,)).fetchone() for end in [*begins, self._end])
        return max((row[1] for row in found if row is not None), default=0)

    def _stretch(self, first: int, until: int) -> None:
        here: dict[int, Stretch] = {}
        for row in self._connection.execute(_GROUPS, (first, until, self._per_column)):
            attempt, scope, column, word, gone, count, low, high, start, end = row[:_BEFORE_LOSSES]
            losses, lengths = row[_BEFORE_LOSSES:_BEFORE_LENGTHS], row[_BEFORE_LENGTHS:]
            stretch = here.setdefault(attempt, Stretch(attempt, first, start, end, low, high))
            stretch.start_ns, stretch.end_ns = min(stretch.start_ns, start), max(stretch.end_ns, end)
            stretch.first_epoch = min(stretch.first_epoch, low)
            stretch.last_epoch = max(stretch.last_epoch, high)
            if not gone:
                found = self._columns.setdefault(column, Epochs(low, high))
                found.first, found.last = min(found.first, low), max(found.last, high)
                if scope == TRAIN:
                    stretch.losses[self._phase(word)].add(*losses)
                    found.losses.add(*losses)
            for pos, what in enumerate(self._words[word]):
                self._add(stretch, scope, column, what, bool(gone), count, *lengths[2 * pos : 2 * pos + 2])
        for attempt in sorted(here):
            stretch = here[attempt]
            before = self._stretches[-1] if self._stretches else None
            if before is not None and before.attempt == attempt:
                stretch.start_ns = before.end_ns  # an `end_epoch` began before the validation within it
            self._stretches.append(stretch)

    def _phase(self, word: int) -> str:
        return next((phase for arc, phase in self._words[word] if arc.trigger is Trigger.FORWARD), "")

    def _add(
        self,
        stretch: Stretch,
        scope: str,
        column: int,
        what: tuple[Arc, str],
        gone: bool,
        count: int,
        ns: int,
        most_ns: int,
    ) -> None:
        """`count` transitions of one kind; negative to take them away again."""
        arc, phase = what
        name = arc.trigger.value if scope == TRAIN else VALIDATION
        if gone:
            stretch.ns[_GONE_VALIDATION if scope != TRAIN else GONE] += ns
            self._gone.add(count, ns if scope == TRAIN else 0, most_ns)
            return
        stretch.ns[name] += ns
        self._totals[scope, arc, phase].add(count, ns, most_ns)
        self._columns[column].ns[name] += ns
        if scope == TRAIN:
            stretch.slowest[name] = max(stretch.slowest.get(name, 0), most_ns)
            self._columns[column].batches += count if arc.trigger is Trigger.END_BATCH else 0

    def _cut_in_two(self) -> Iterator[tuple[Any, ...]]:
        """Packed rows of which only the first part stands; one for each attempt that was gone back in, at most."""
        for (kept_until,) in self._connection.execute(
            "SELECT kept_until FROM attempts WHERE kept_until IS NOT NULL AND kept_until >= first_seq"
        ).fetchall():
            row = self._connection.execute(
                f"""SELECT seq, attempt, (SELECT name FROM scopes WHERE scopes.scope = packed.scope),
                    CASE WHEN epoch < 0 THEN -1 ELSE epoch / ?1 END, word,
                    {", ".join(f"d{pos}" for pos in range(ROW_LENGTH))}
                    FROM {transitions_between(f"?2 - {ROW_LENGTH - 1}", "?2")} AS packed ORDER BY seq DESC LIMIT 1""",
                (self._per_column, min(kept_until, self._end - 1)),
            ).fetchone()
            if row is not None and row[0] + len(self._words[row[4]]) - 1 > kept_until:
                yield kept_until, *row

    def _move(
        self, kept_until: int, seq: int, attempt: int, scope: str, column: int, word: int, *lengths: int
    ) -> None:
        """Count what follows `kept_until` in this row as superseded."""
        stretch = [s for s in self._stretches if s.attempt == attempt and s.first_seq <= seq][-1]
        for pos, what in enumerate(self._words[word]):
            if seq + pos > kept_until:
                self._add(stretch, scope, column, what, False, -1, -lengths[pos], 0)
                self._add(stretch, scope, column, what, True, 1, lengths[pos], lengths[pos])

    def _set_validation_apart(self) -> None:
        """Passes are part of the `end_epoch` that they ran in, or of the `end_batch`, a little later in the journal."""
        totals = self._totals.items()
        validated = sum(total.ns for (scope, _, _), total in totals if scope != TRAIN)
        ends = sum(
            t.ns for (scope, arc, _), t in totals if scope == TRAIN and arc.trigger is Trigger.END_EPOCH
        )
        around = Trigger.END_EPOCH if ends >= validated else Trigger.END_BATCH
        carry: dict[tuple[int, bool], int] = defaultdict(int)
        for stretch in self._stretches:
            lost = stretch.ns.pop(_GONE_VALIDATION, 0)
            stretch.ns[GONE] += lost
            for gone, name, spent_here in (
                (False, around.value, stretch.ns[VALIDATION]),
                (True, GONE, lost),
            ):
                owed = carry[stretch.attempt, gone] + spent_here
                paid = min(owed, stretch.ns[name] - (lost if gone else 0))
                stretch.ns[name] -= paid
                carry[stretch.attempt, gone] = owed - paid
        for epochs in self._columns.values():
            epochs.ns[around.value] -= min(epochs.ns[around.value], epochs.ns[VALIDATION])
