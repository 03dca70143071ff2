"""The language of legal words: is this sequence of transitions one that the machine can have made?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from states.table import EVALUATION, TERMINAL, TRAINING, Row, State, Trigger, arcs

__all__ = [
    "TRAINING_SCOPE",
    "Chain",
    "JournalReader",
    "JournalRow",
    "Move",
    "Reader",
    "Violation",
    "Word",
    "first_illegal",
    "first_illegal_row",
    "is_legal",
    "legal_triggers",
    "words",
]

TRAINING_SCOPE = "train"
"""The scope of the training's own rows in a journal; every other scope is that of a validation."""


class Move(NamedTuple):
    """One transition as it was made."""

    trigger: Trigger
    source: State
    dest: State


@dataclass(frozen=True)
class Violation:
    """The first move (or row) that makes a word illegal; `index` counts from 0."""

    index: int
    message: str


@dataclass(frozen=True)
class Word:
    """The moves of one machine: those of the training, or those of one pass of a validation.

    `places` are the indices of its rows in the journal that was split.
    """

    scope: str
    moves: tuple[Move, ...]
    places: tuple[int, ...]


class JournalRow(Protocol):
    """What is read of a row of a journal; trigger and states are members or their values."""

    @property
    def attempt(self) -> int:
        """The attempt that made the move, counted from 1."""

    @property
    def scope(self) -> str:
        """'train', or 'validation/NAME'."""

    @property
    def trigger(self) -> Trigger | str:
        """What was fired."""

    @property
    def source(self) -> State | str:
        """The state that the move left."""

    @property
    def dest(self) -> State | str:
        """The state that the move reached."""


def legal_triggers(state: State, table: tuple[Row, ...] = TRAINING) -> tuple[Trigger, ...]:
    """The triggers that lead on from `state`, each once, in the table's order; none from DONE."""
    return tuple(dict.fromkeys(row.trigger for row in table if state in row.sources))


class Chain:
    """Moves of which each begins where the one before ended: only where they begin and end matters to a word.

    Made once for millions of rows that are alike.
    """

    def __init__(self, moves: Sequence[tuple[Trigger, State, State]]) -> None:
        self.moves = tuple(Move(*move) for move in moves)
        self.length = len(self.moves)
        self.source, self.dest = self.moves[0].source, self.moves[-1].dest
        self._linked = all(one.dest is next_.source for one, next_ in pairwise(self.moves))
        self.leaves_idle = any(move.source is State.IDLE for move in self.moves)
        self.ends = self.dest in TERMINAL
        self.fetches = sum(move.trigger is Trigger.FETCH for move in self.moves)
        """How many batches are taken in it."""
        self.turns = any(move.trigger in (Trigger.BEGIN_EPOCH, Trigger.RESUME) for move in self.moves)
        """Whether it goes on in another epoch than that of the move before it, or may."""
        self._within: dict[int, bool] = {}

    def within(self, table: tuple[Row, ...]) -> bool:
        """Whether it is a chain, all of moves of the table."""
        found = self._within.get(id(table))
        if found is None:
            legal = {(arc.trigger, arc.source, arc.dest) for arc in arcs(table)}
            found = self._within[id(table)] = self._linked and all(move in legal for move in self.moves)
        return found

    def cut(self, length: int) -> tuple[Chain, Chain]:
        """The first `length` moves, and the others."""
        return Chain(self.moves[:length]), Chain(self.moves[length:])


class Reader:
    """Reads one word, move by move.

    Invariant: `state` is where the word stands, its illegal moves left out.
    """

    def __init__(self, table: tuple[Row, ...] = TRAINING, state: State = State.IDLE) -> None:
        self._table = table
        self._legal = {(arc.trigger, arc.source, arc.dest) for arc in arcs(table)}
        self.state = state

    def feed(self, move: Move, *, begins_attempt: bool = True) -> str | None:
        """Read one move: None if it is legal, else what was found and what was expected.

        `begins_attempt`: whether the move may be the first of an attempt that takes the word up again;
        moves alone do not tell. Such a move may be a `resume` to the very state in which the word stands:
        all that came after it was superseded, the halt included, and is not in the word.
        """
        problem = self._problem(move, begins_attempt)
        if problem is None:
            self.state = move.dest
        return problem

    def feed_chain(self, chain: Chain) -> bool:
        """Read a chain's moves at once, none an attempt's first; False, and nothing read, if that is illegal."""
        if chain.source is not self.state or not chain.within(self._table):
            return False
        self.state = chain.dest
        return True

    def _problem(self, move: Move, begins_attempt: bool) -> str | None:
        trigger, source, dest = move
        if (trigger, source, dest) not in self._legal:
            return f"{_shown(move)} is not in the table; {self._expected()}"
        if source is self.state:
            return None
        if trigger is Trigger.RESUME and begins_attempt:
            if dest is self.state:
                return None
            return f"{_shown(move)}, but the word that is taken up stands in {self.state.value}"
        return f"{_shown(move)}, but the word stands in {self.state.value}; {self._expected()}"

    def _expected(self) -> str:
        triggers = ", ".join(trigger.value for trigger in legal_triggers(self.state, self._table))
        return f"expected from {self.state.value}: {triggers or 'nothing, the word has ended'}"


def _shown(move: Move) -> str:
    return f"{move.trigger.value} from {move.source.value} to {move.dest.value}"


def first_illegal(moves: Iterable[Move], table: tuple[Row, ...] = TRAINING) -> Violation | None:
    """The first move that is illegal after those before it; None if the moves begin a legal word.

    A word starts in IDLE. For `resume` see `Reader.feed`.
    """
    reader = Reader(table)
    for index, move in enumerate(moves):
        problem = reader.feed(move)
        if problem is not None:
            return Violation(index, problem)
    return None


def is_legal(moves: Iterable[Move], table: tuple[Row, ...] = TRAINING) -> bool:
    """Whether the moves are a legal word, or the beginning of one."""
    return first_illegal(moves, table) is None


def _move(row: JournalRow) -> Move:
    return Move(Trigger(row.trigger), State(row.source), State(row.dest))


class JournalReader:
    """Reads the rows of a journal in their order, those of all scopes.

    The training's rows are one word over all attempts. Each pass of a validation is a word of its own,
    from IDLE to DONE, or to HALTED if it was abandoned. A pass without an end is legal only if its attempt
    ended with it: nothing of the attempt follows but the training's `halt`.
    """

    def __init__(self) -> None:
        self.training = Reader(TRAINING)
        self._attempt: int | None = None
        self._pass: Reader | None = None
        self._pass_scope = ""

    def feed(self, row: JournalRow) -> str | None:
        """Read one row: None if it is legal, else what was found and what was expected."""
        begins_attempt, self._attempt = row.attempt != self._attempt, row.attempt
        if begins_attempt:
            self._pass = None
        try:
            move = _move(row)
        except ValueError as error:
            return f"{row.scope}: {error}; expected a name from the table"
        problem = self._unfinished(row.scope, move) or self._reader(row.scope).feed(
            move, begins_attempt=begins_attempt
        )
        if self._pass is not None and self._pass.state in TERMINAL:
            self._pass = None
        return problem and f"{row.scope}: {problem}"

    def feed_chain(self, attempt: int, scope: str, chain: Chain) -> bool:
        """Read rows that go on with the word at hand at once, if they are legal and that is all they do.

        False, and nothing read, where they are to be read one by one.
        """
        if attempt != self._attempt:
            return False
        if scope == TRAINING_SCOPE:
            return self._pass is None and self.training.feed_chain(chain)
        if self._pass is None or scope != self._pass_scope or chain.leaves_idle or chain.ends:
            return False
        return self._pass.feed_chain(chain)

    def _unfinished(self, scope: str, move: Move) -> str | None:
        """What is wrong if `move` follows a pass that has not ended."""
        if self._pass is None or (scope == self._pass_scope and move.source is not State.IDLE):
            return None
        unfinished, self._pass = self._pass, None
        if scope == TRAINING_SCOPE and move.trigger is Trigger.HALT:
            return None
        return (
            f"{_shown(move)}, but a pass of {self._pass_scope} stands in {unfinished.state.value}; "
            "expected its end, DONE or HALTED, before the attempt goes on"
        )

    def _reader(self, scope: str) -> Reader:
        if scope == TRAINING_SCOPE:
            return self.training
        if self._pass is None:
            self._pass, self._pass_scope = Reader(EVALUATION), scope
        return self._pass


def first_illegal_row(rows: Iterable[JournalRow]) -> Violation | None:
    """The first row of a journal that no legal run can have written; None if there is none.

    `rows` are those not superseded, of all scopes, in the order of `seq`.
    """
    reader = JournalReader()
    for index, row in enumerate(rows):
        problem = reader.feed(row)
        if problem is not None:
            return Violation(index, problem)
    return None


def words(rows: Iterable[JournalRow]) -> list[Word]:
    """The rows of a journal split into words, in the order of their first rows.

    A pass of a validation begins with a move from IDLE, after an end, or with an attempt. Raises ValueError
    for a trigger or state that does not exist.
    """
    found: list[list[tuple[int, Move]]] = []
    scopes: list[str] = []
    open_words: dict[str, int] = {}
    attempts: dict[str, int] = {}
    for place, row in enumerate(rows):
        move = _move(row)
        begins = row.scope not in open_words
        if row.scope != TRAINING_SCOPE and not begins:
            last = found[open_words[row.scope]][-1][1]
            begins = move.source is State.IDLE or last.dest in TERMINAL or row.attempt != attempts[row.scope]
        if begins:
            open_words[row.scope] = len(found)
            found.append([])
            scopes.append(row.scope)
        attempts[row.scope] = row.attempt
        found[open_words[row.scope]].append((place, move))
    return [
        Word(scope, tuple(move for _, move in word), tuple(place for place, _ in word))
        for scope, word in zip(scopes, found, strict=True)
    ]
