"""Where two trainings part: their transitions walked through in step. Nothing is read from files here."""

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from states.table import Trigger
from tracking.journal import TRAIN, Metric, Transition

__all__ = [
    "Comparison",
    "Digest",
    "Parting",
    "Values",
    "compare",
    "compare_values",
    "digest_of",
    "same_number",
]

_DIGEST = re.compile(r"(?:^|; )parameters (\w+):([0-9a-f]+)")
_PAUSES = frozenset({Trigger.HALT, Trigger.RESUME})


@dataclass(frozen=True)
class Digest:
    """A digest of all parameters, as `ParameterDigests` notes it; those of two methods say nothing together."""

    method: str
    value: str

    def __str__(self) -> str:
        return f"{self.method}:{self.value}"


@dataclass(frozen=True)
class Parting:
    """The first transition that differs, on both sides, and the first thing that differs in it."""

    what: Literal["transition", "loss", "parameters"]
    left: Transition
    right: Transition


@dataclass(frozen=True)
class Comparison:
    """What two trainings have in common from where the comparison began.

    `same` transitions are equal, `digests` of them by their digests too, of which `last_digest` (the left one)
    is the last. Then they part, or `beyond` is the first transition that only the `longer` one has, or both end.
    """

    same: int
    digests: int
    last_digest: Transition | None
    parting: Parting | None
    longer: Literal["left", "right"] | None
    beyond: Transition | None


@dataclass(frozen=True)
class Values:
    """`same` values that both have are equal; then come the first two that are not (None: there are none)."""

    same: int
    parting: tuple[Metric, Metric] | None


def compare(left: Iterable[Transition], right: Iterable[Transition]) -> Comparison:
    """Walk through what stands of two trainings in step, up to the first difference.

    Compared are trigger, states, epoch, batch and phase, then the loss, bit for bit (one NaN is like
    another; a loss that has not arrived is like any), then digests of one method. Times and attempts are
    not, and `halt` and `resume` are left out, as are rows of validation: an interruption is no difference.
    """
    same = digests = 0
    last_digest = None
    for one, other in zip_longest(_moves(left), _moves(right)):
        if one is None or other is None:
            return Comparison(
                same, digests, last_digest, None, "right" if one is None else "left", one or other
            )
        parting = _parting(one, other)
        if parting is not None:
            return Comparison(same, digests, last_digest, parting, None, None)
        same += 1
        if _comparable(one, other):
            digests, last_digest = digests + 1, one
    return Comparison(same, digests, last_digest, None, None, None)


def compare_values(left: Iterable[Metric], right: Iterable[Metric]) -> Values:
    """Compare the values of one scope, epoch, batch and key that both have, in the order of the left ones."""
    theirs = {_measured(metric): metric for metric in right}
    same = 0
    for one in left:
        other = theirs.get(_measured(one))
        if other is None:
            continue
        if not same_number(one.value, other.value):
            return Values(same, (one, other))
        same += 1
    return Values(same, None)


def digest_of(note: str) -> Digest | None:
    """The digest of the parameters in a transition's note; None if there is none."""
    found = _DIGEST.search(note)
    return Digest(found[1], found[2]) if found else None


def same_number(one: float, other: float) -> bool:
    """Are they equal bit for bit? 0.0 and -0.0 are not; NaN and NaN are."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return struct.pack("<d", one) == struct.pack("<d", other)


def _moves(rows: Iterable[Transition]) -> Iterator[Transition]:
    return (row for row in rows if row.scope == TRAIN and row.trigger not in _PAUSES)


def _parting(one: Transition, other: Transition) -> Parting | None:
    if _move(one) != _move(other):
        return Parting("transition", one, other)
    if one.loss is not None and other.loss is not None and not same_number(one.loss, other.loss):
        return Parting("loss", one, other)
    if _comparable(one, other) and digest_of(one.note) != digest_of(other.note):
        return Parting("parameters", one, other)
    return None


def _move(row: Transition) -> tuple[object, ...]:
    return row.trigger, row.source, row.dest, row.epoch, row.batch, row.phase


def _comparable(one: Transition, other: Transition) -> bool:
    """Has each a digest, of one method?"""
    if not (one.note and other.note):
        return False
    mine, theirs = digest_of(one.note), digest_of(other.note)
    return mine is not None and theirs is not None and mine.method == theirs.method


def _measured(metric: Metric) -> tuple[object, ...]:
    return metric.scope, metric.epoch, metric.batch, metric.key
