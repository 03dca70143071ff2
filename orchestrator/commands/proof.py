"""Is a journal what it should be? Its rows are read once, by checks that each watch over one thing.

A run has millions of transitions, and few kinds of packed rows. A check that can tell of a whole row that nothing is
wrong with it says so; where it cannot, it is shown the row's transitions one by one, and names what it finds.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from orchestrator.commands.layout import count
from states.language import JournalReader, Move, Reader
from states.table import TRAINING, State, Trigger
from tracking.journal import TRAIN, Attempt, Packed

__all__ = ["Finding", "Question", "ask", "questions"]

_MOST_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """What one check found, said in words with counts; `good` is False for something that is wrong."""

    part: str
    text: str
    good: bool = True


class Step(NamedTuple):
    """What is asked about one transition."""

    seq: int
    attempt: int
    scope: str
    epoch: int
    batch: int
    trigger: Trigger
    source: State
    dest: State
    superseded: bool


def _steps(row: Packed) -> Iterator[Step]:
    """The transitions of a row, each by itself."""
    place = (row.attempt, row.scope, row.epoch, row.batch)
    for seq, move in enumerate(row.chain.moves, row.first):
        yield Step(seq, *place, *move, row.superseded)


class Question(Protocol):
    """Watches over one property of a journal while its rows go by."""

    part: str

    def see_all(self, row: Packed) -> bool:
        """Look at a whole row, if nothing is wrong with it; False, and not looked, where each is to be seen alone."""

    def see(self, found: Step) -> str | None:
        """Look at the next transition, superseded ones included; what is wrong with it, if anything is."""

    def end(self) -> Iterator[str]:
        """What is wrong with the whole."""

    def good(self) -> str:
        """What has been proved, if nothing was wrong."""


def questions(attempts: Sequence[Attempt], *, branched: bool = False) -> list[Question]:
    """Everything that is asked of a journal with these attempts; the last may have no end yet.

    `branched`: the run goes on from a moment of another, whose epochs and batches are not in this journal.
    """
    return [Numbers(attempts), Words(attempts), Superseding(attempts), Batches(branched), Ends(attempts)]


def ask(asked: Sequence[Question], rows: Iterable[Packed]) -> list[Finding]:
    """Show every row to every question, and collect what they found."""
    wrong: list[list[str]] = [[] for _ in asked]
    pairs = list(zip(asked, wrong, strict=True))
    for row in rows:
        for question, problems in pairs:
            if not question.see_all(row):
                found = ((step.seq, question.see(step)) for step in _steps(row))
                problems += [f"transition {seq}: {problem}" for seq, problem in found if problem is not None]
    findings = []
    for question, problems in zip(asked, wrong, strict=True):
        problems[:0] = question.end()
        findings += [Finding(question.part, text, good=False) for text in problems[:_MOST_NAMED]]
        if len(problems) > _MOST_NAMED:
            more = f"and {len(problems) - _MOST_NAMED:,} more of this kind"
            findings.append(Finding(question.part, more, good=False))
        if not problems:
            findings.append(Finding(question.part, question.good()))
    return findings


class Numbers:
    """Every transition is there once: seq goes up by one from 1, and each is of the attempt it falls to."""

    part = "transitions"

    def __init__(self, attempts: Sequence[Attempt]):
        self._attempts = attempts
        self._next = 1
        self._current = 0

    def see_all(self, row: Packed) -> bool:
        attempts, current = self._attempts, self._current
        if row.first != self._next or row.attempt != attempts[current].attempt:
            return False
        if current + 1 < len(attempts) and attempts[current + 1].first_seq <= row.last:
            return False
        self._next = row.last + 1
        return True

    def see(self, found: Step) -> str | None:
        expected, self._next = self._next, found.seq + 1
        while (
            self._current + 1 < len(self._attempts)
            and self._attempts[self._current + 1].first_seq <= found.seq
        ):
            self._current += 1
        if found.seq != expected:
            missing = f"{expected}" if found.seq == expected + 1 else f"{expected} to {found.seq - 1}"
            return f"expected {expected} here; missing: {missing}"
        if found.attempt != self._attempts[self._current].attempt:
            return (
                f"is of attempt {found.attempt}, but falls to attempt {self._attempts[self._current].attempt}"
            )
        return None

    def end(self) -> Iterator[str]:
        late = [attempt for attempt in self._attempts if attempt.first_seq > self._next]
        for attempt in late[:1]:
            yield (
                f"attempt {attempt.attempt} begins with transition {attempt.first_seq}; "
                f"the last before it is {self._next - 1}"
            )

    def good(self) -> str:
        return f"{count(self._next - 1, 'transition')} of {count(len(self._attempts), 'attempt')}, none is missing"


class Words:
    """What stands is one legal word, and each validation pass is; so was every attempt when it was made."""

    part = "words"

    def __init__(self, attempts: Sequence[Attempt]):
        self._standing = JournalReader()
        self._of_attempts = {
            attempt.attempt: Reader(TRAINING, State.IDLE if attempt.attempt == 1 else State.HALTED)
            for attempt in attempts
        }
        self._moves = self._passes = 0

    def see_all(self, row: Packed) -> bool:
        # What stands is read first: where that cannot be read at once, nothing has been read.
        scope, chain = row.scope, row.chain
        training = scope == TRAIN
        own = self._of_attempts.get(row.attempt) if training else None
        if own is not None and not (own.state is chain.source and chain.within(TRAINING)):
            return False
        if not row.superseded:
            if not self._standing.feed_chain(row.attempt, scope, chain):
                return False
            self._moves += chain.length if training else 0
        if own is not None:
            own.feed_chain(chain)
        return True

    def see(self, found: Step) -> str | None:
        problem = None
        if found.scope == TRAIN and found.attempt in self._of_attempts:
            move = Move(found.trigger, found.source, found.dest)
            problem = self._of_attempts[found.attempt].feed(move, begins_attempt=False)
        if not found.superseded:
            self._moves += found.scope == TRAIN
            self._passes += found.scope != TRAIN and found.source is State.IDLE
            problem = self._standing.feed(found) or problem
        return problem

    def end(self) -> Iterator[str]:
        return iter(())

    def good(self) -> str:
        state = self._standing.training.state.value
        passes = f"; {count(self._passes, 'validation pass', 'validation passes')}" if self._passes else ""
        return f"the training's {self._moves:,} are a legal word, up to {state}{passes}"


class Superseding:
    """A row is superseded just if a later attempt went back behind it; each went back to a row that stood."""

    part = "superseding"

    def __init__(self, attempts: Sequence[Attempt]):
        self._attempts = attempts
        self._to_come = {attempt.position: attempt for attempt in attempts if attempt.position}
        self._limits = {attempt.attempt: _limit(attempt.attempt, attempts) for attempt in attempts}
        self._hidden = 0
        self._positions = sorted(self._to_come)

    def see_all(self, row: Packed) -> bool:
        at = bisect_left(self._positions, row.first)
        if at < len(self._positions) and self._positions[at] <= row.last:
            return False
        limit = self._limits.get(row.attempt, math.inf)
        if not (row.superseded == (row.first > limit) == (row.last > limit)):
            return False
        self._hidden += row.last - row.first + 1 if row.superseded else 0
        return True

    def see(self, found: Step) -> str | None:
        self._hidden += found.superseded
        back = self._to_come.pop(found.seq, None)
        if back is not None:
            stood = _limit(found.attempt, self._attempts[: back.attempt - 1])
            if found.scope != TRAIN or found.attempt >= back.attempt or found.seq > stood:
                return (
                    f"attempt {back.attempt} went back to it; expected a training transition that stood then"
                )
        if found.superseded != (found.seq > self._limits.get(found.attempt, math.inf)):
            return f"is {'' if found.superseded else 'not '}superseded; the attempts' positions say otherwise"
        return None

    def end(self) -> Iterator[str]:
        for position, attempt in self._to_come.items():
            yield f"attempt {attempt.attempt} went back to transition {position}, which is missing"
        for attempt in self._attempts:
            limit = math.inf if attempt.kept_until is None else attempt.kept_until
            if limit != self._limits[attempt.attempt]:
                yield f"attempt {attempt.attempt} stands up to {limit}; the attempts' positions say otherwise"

    def good(self) -> str:
        resumes = sum(attempt.position is not None for attempt in self._attempts)
        if not resumes:
            return "nothing is superseded"
        return (
            f"{count(self._hidden, 'transition')} superseded by {count(resumes, 'resume')}, the rest stands"
        )


def _limit(attempt: int, attempts: Sequence[Attempt]) -> float:
    """The seq up to which an attempt's transitions stand, after all these attempts."""
    positions = (later.position for later in attempts if later.attempt > attempt)
    return min((position for position in positions if position is not None), default=math.inf)


class Batches:
    """In what stands of the training, epochs and batches follow one another: none is skipped or repeated.

    They begin with batch 0 of epoch 0; in a branch, at the place that its first `resume` names.
    """

    part = "batches"

    def __init__(self, branched: bool = False) -> None:
        self._epoch = self._batch = -1
        self._fetched = self._epochs = 0
        self._to_branch = branched

    def see_all(self, row: Packed) -> bool:
        chain = row.chain
        if row.superseded or row.scope != TRAIN:
            return True
        if chain.turns or chain.fetches > 1:
            return False
        if chain.fetches:
            if row.epoch != self._epoch or row.batch != self._batch + 1:
                return False
            self._batch += 1
            self._fetched += 1
        return True

    def see(self, found: Step) -> str | None:
        if found.superseded or found.scope != TRAIN:
            return None
        if self._to_branch and found.trigger is Trigger.RESUME:
            self._to_branch = False
            self._epoch, self._batch = found.epoch, found.batch
            self._epochs += found.dest not in (State.IDLE, State.EPOCH_END)
            return None
        if found.trigger is Trigger.BEGIN_EPOCH:
            expected = (self._epoch + 1, -1)
            self._epochs += 1
        elif found.trigger is Trigger.FETCH:
            expected = (self._epoch, self._batch + 1)
            self._fetched += 1
        else:
            return None
        self._epoch, self._batch = found.epoch, found.batch
        if (found.epoch, found.batch) != expected:
            place = f"epoch {found.epoch}, batch {found.batch}"
            return f"{found.trigger.value} of {place}; expected epoch {expected[0]}, batch {expected[1]}"
        return None

    def end(self) -> Iterator[str]:
        return iter(())

    def good(self) -> str:
        batches = count(self._fetched, "batch", "batches")
        return f"{batches} of {count(self._epochs, 'epoch')} in order, none skipped or repeated"


class Ends:
    """Each attempt's end says what its last training transition says."""

    part = "attempts"

    def __init__(self, attempts: Sequence[Attempt]):
        self._attempts = attempts
        self._last: dict[int, State] = {}

    def see_all(self, row: Packed) -> bool:
        if row.scope == TRAIN:
            self._last[row.attempt] = row.chain.dest
        return True

    def see(self, found: Step) -> str | None:
        if found.scope == TRAIN:
            self._last[found.attempt] = found.dest
        return None

    def end(self) -> Iterator[str]:
        for attempt in self._attempts:
            if attempt.outcome is None:
                if attempt is not self._attempts[-1]:
                    yield f"attempt {attempt.attempt} has no end, though a later one has begun"
                continue
            state = self._last.get(attempt.attempt, State.IDLE if attempt.attempt == 1 else State.HALTED)
            if attempt.end_state is not state:
                ended = attempt.end_state.value if attempt.end_state else "nowhere"
                yield f"attempt {attempt.attempt} ended in {ended}, its last transition leads to {state.value}"
            if attempt.outcome == "done" and state is not State.DONE:
                yield f"attempt {attempt.attempt} is said to be done, its last transition leads to {state.value}"

    def good(self) -> str:
        outcomes = ", ".join(attempt.outcome or "running" for attempt in self._attempts)
        return f"{count(len(self._attempts), 'attempt')} ({outcomes}), each ends where its transitions do"
