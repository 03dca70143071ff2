"""What a run's training has behind it: stretches of its own journal, and before them of its ancestors'."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from states.errors import InterlockError
from tracking.journal import TRAIN, Attempt, Journal, Transition
from tracking.runs import RunFolder, folder_of_parent

__all__ = ["END", "AncestorGoneError", "Stretch", "lineage_of", "rows_of", "shared", "stretches"]

END = 2**63 - 1
"""The `last` of a stretch that is not over."""


class AncestorGoneError(InterlockError):
    """A run goes on from another whose folder is not there any more."""


@dataclass(frozen=True)
class Stretch:
    """Transitions of one run, of all scopes, from seq `first` to `last`."""

    run: str
    first: int
    last: int


def stretches(run: str, attempts: Sequence[Attempt], until: int = END) -> list[Stretch]:
    """What stood in a run's journal when `until` was its newest transition; later attempts are as if not made."""
    found: list[Stretch] = []
    kept, beyond = until, until
    for attempt in reversed([attempt for attempt in attempts if attempt.first_seq <= until]):
        last = min(kept, beyond)
        if attempt.first_seq <= last:
            found.append(Stretch(run, attempt.first_seq, last))
        beyond = attempt.first_seq - 1
        kept = kept if attempt.position is None else min(kept, attempt.position)
    return found[::-1]


def lineage_of(run: RunFolder, known: Mapping[str, RunFolder]) -> tuple[list[Stretch], dict[str, RunFolder]]:
    """All that a run has behind it, oldest first, and the folders of the runs that it lies in.

    `known` are folders that need not be looked for, by id. Of an ancestor that is gone there is one stretch,
    and no folder. A warm start has its own transitions only, and so has a branch that does not say from which.
    """
    found: list[Stretch] = []
    folders: dict[str, RunFolder] = {}
    at: RunFolder | None = run
    until = END
    while at is not None:
        with Journal.open(at) as journal:
            info, attempts = journal.run_info(), journal.attempts()
        folders[info.id] = at
        found[:0] = stretches(info.id, attempts, until)
        parent = info.parent
        if parent is None or parent.kind != "branch" or parent.seq is None:
            break
        until, child = parent.seq, at
        at = known.get(parent.run) or folder_of_parent(child, parent)
        if at is None:
            found[:0] = [Stretch(parent.run, 1, until)]
    return found, folders


def shared(
    left: Sequence[Stretch], right: Sequence[Stretch]
) -> tuple[list[Stretch], list[Stretch], list[Stretch]]:
    """What both have behind them, and what comes after it on either side."""
    common: list[Stretch] = []
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if (one.run, one.first) != (other.run, other.first):
            return common, list(left[number:]), list(right[number:])
        last = min(one.last, other.last)
        common.append(Stretch(one.run, one.first, last))
        if one.last != other.last:
            return common, _after(left[number:], last), _after(right[number:], last)
    return common, list(left[len(common) :]), list(right[len(common) :])


def _after(some: Sequence[Stretch], seq: int) -> list[Stretch]:
    first, *rest = some
    return [Stretch(first.run, seq + 1, first.last), *rest] if first.last > seq else rest


def rows_of(some: Iterable[Stretch], folders: Mapping[str, RunFolder]) -> Iterator[Transition]:
    """The training's transitions in these stretches, those included that are in a flight recorder only so far.

    Raises AncestorGoneError if they lie in a run that is not there.
    """
    for stretch in some:
        if stretch.run not in folders:
            raise AncestorGoneError(
                f"transitions {stretch.first} to {stretch.last} of {stretch.run} are needed, from which a run was "
                "branched, but its folder is neither where it was nor beside that run; put it back"
            )
        with Journal.open(folders[stretch.run]) as journal:
            live = stretch.last == END
            for row in journal.transitions(after=stretch.first - 1, include_superseded=True, live=live):
                if row.seq > stretch.last:
                    break
                if row.scope == TRAIN:
                    yield row
