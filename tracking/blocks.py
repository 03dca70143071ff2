"""Packed rows by the thousand: what the flight recorder and the queue of values hold, as columns and as blocks."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tracking import packed
from tracking.frames import (
    ARC_AT,
    BEGAN,
    LOSS,
    NS,
    PENDING,
    STEPS,
    STEPS_IN_A_FRAME,
    TAGS,
    TEXT,
    WORDS,
    phase_of,
    scope_of,
    texts_after,
)
from tracking.packed import (
    BATCH_DIGITS,
    BLOCK_ROWS,
    EXPONENT_DIGITS,
    KEYSET_DIGITS,
    MANTISSA_DIGITS,
    NUMBER_DIGITS,
    SEQ_DIGITS,
    WORD_DIGITS,
)
from tracking.values import ROW_WORDS, VALUES_AT, Kind

__all__ = ["Block", "MetricBlock", "blocks", "metric_blocks"]

_MOST_DIGITS = 4000
"""In a block: its row then fits on one of SQLite's pages, where it is read without being copied."""

_AT_ONCE = 4_096
"""Frames that are worked on together: so few that all that is worked out of them stays in a processor's cache."""

PatternOf = Callable[[bytes, int], tuple[int, int, bool]]
"""Of the arcs of a frame and its phase: their word, how many they are, and whether there is a loss among them."""


_STEPS = slice(STEPS, STEPS + STEPS_IN_A_FRAME)


class Block(NamedTuple):
    """Consecutive packed rows of one scope and epoch, as a row of `transition_blocks` less its attempt."""

    seq: int
    last: int
    rows: int
    scope: int
    epoch: int
    batch: int
    time_ns: int
    length: int
    lead: int
    width: int
    record: int
    data: bytes


class MetricBlock(NamedTuple):
    """Consecutive packed rows of values of one scope and epoch, as a row of `metric_blocks` less its attempt and id."""

    rows: int
    scope: int
    epoch: int
    seq: int
    batch: int
    step: int
    time_ns: int
    length: int
    lead: int
    span: int
    record: int
    data: bytes


def blocks(
    data: bytes, skip: int, since_ns: int, pattern: PatternOf, scopes: Sequence[int]
) -> Iterator[tuple[int, int, Iterator[Block]]]:
    """What of the frames in `data` is in blocks, in their order: from which frame to before which, and the blocks.

    `scopes` are the journal's numbers of the recorder's, which began at `since_ns`. Not in blocks: a first frame of
    which `skip` transitions were taken before, those with notes, and text.
    """
    rows = np.frombuffer(data, "<i8").reshape(-1, WORDS)
    number = -(-len(rows) // _AT_ONCE)
    at_once = -(-len(rows) // number)
    for start in range(0, len(rows), at_once):
        frames = _Frames(rows[start : start + at_once], skip > 0 and start == 0, since_ns, pattern)
        for first, beyond in _runs(frames.storable, frames.follows()):
            yield start + first, start + beyond, frames.blocks(first, beyond, scopes)


class _Frames:
    """Frames of the flight recorder as the columns of their words, with the journal's word of each."""

    def __init__(self, rows: np.ndarray, cut: bool, since_ns: int, pattern: PatternOf) -> None:
        """`cut`: some transitions of the first frame were taken before."""
        columns = np.ascontiguousarray(rows.T)
        self._seq, self._epoch, self._batch = columns[:TAGS]
        tags, self._loss = columns[TAGS], columns[LOSS]
        self._scope, phase = scope_of(tags), phase_of(tags)
        left = (self._scope != TEXT) & (texts_after(tags) == 0)
        left[0] &= not cut
        self.storable = left.copy()
        """What a block's digits can say."""
        frames = len(rows)
        self._word, self._length = np.zeros((2, frames), np.int64)
        self._carries = np.zeros(frames, np.bool_)
        arcs = np.ascontiguousarray(rows.view(np.uint8).reshape(frames, WORDS, 8)[:, _STEPS, ARC_AT // 8])
        kind = arcs.view(np.int64)[:, 0]
        while left.any():
            one = int(np.argmax(left))
            same = left & (kind == kind[one]) & (phase == phase[one])
            left ^= same
            self._word[same], self._length[same], self._carries[same] = pattern(
                arcs[one].tobytes(), int(phase[one])
            )
        most = max(1, int(self._length.max()))
        times = columns[STEPS : STEPS + most] & NS
        self._time = times[0] + since_ns
        self._durations = np.empty_like(times)
        # Of their lower bits, which are the times, with its sign.
        self._durations[0] = columns[STEPS] - columns[BEGAN] << 64 - ARC_AT >> 64 - ARC_AT
        np.subtract(times[1:], times[:-1], out=self._durations[1:])
        if int(self._length.min()) < most:
            self._durations[np.arange(most)[:, None] >= self._length] = 0
        self.storable &= (self._word < 10**WORD_DIGITS) & (self._durations >= 0).all(axis=0)

    def follows(self) -> np.ndarray:
        """Of each frame but the first: can it stand in a block behind the one before?"""
        found: np.ndarray = _goes_on(self._scope, self._epoch, self._batch, self._time)
        found &= self._seq[1:] == self._seq[:-1] + self._length[:-1]
        return found

    def blocks(self, first: int, beyond: int, scopes: Sequence[int]) -> Iterator[Block]:
        """Those of frames that follow each other, all of one of `scopes`."""
        run = slice(first, beyond)
        seq, batch, time_ns, lengths = (x[run] for x in (self._seq, self._batch, self._time, self._length))
        length = int(lengths.max())
        durations = self._durations[:length, run]
        width, lead = _width(durations.max()), _width(time_ns[-1] - time_ns[0])
        record = lead + SEQ_DIGITS + BATCH_DIGITS + WORD_DIGITS + length * width + NUMBER_DIGITS
        scope = scopes[self._scope[first]]
        pieces = _Pieces(len(seq), record)
        pieces.put(lead, pieces.since(time_ns))
        place = pieces.since(seq) * 10**BATCH_DIGITS + pieces.since(batch)
        pieces.put(8, place * 10**WORD_DIGITS + self._word[run])
        pieces.put(width, *durations)
        pieces.put_numbers(np.where(self._carries[run], self._loss[run], _PENDING_BITS))
        for begin, end, digits in pieces.digits():
            yield Block(
                seq=int(seq[begin]),
                last=int(seq[end - 1] + lengths[end - 1]) - 1,
                rows=end - begin,
                scope=scope,
                epoch=int(self._epoch[first]),
                batch=int(batch[begin]),
                time_ns=int(time_ns[begin]),
                length=length,
                lead=lead,
                width=width,
                record=record,
                data=digits,
            )


def metric_blocks(
    data: bytes,
    kinds: Sequence[Kind],
    scope_of: Callable[[str], int],
    keyset_of: Callable[[tuple[str, ...]], int],
) -> Iterator[tuple[int, int, list[MetricBlock]]]:
    """What of rows of values is in blocks, in their order: from which row to before which, and the blocks.

    `scope_of` and `keyset_of` give the journal's numbers. Not in blocks: parts of a moment, and an epoch's values.
    """
    columns = np.ascontiguousarray(np.frombuffer(data, "<i8").reshape(-1, ROW_WORDS).T)
    seq, epoch, batch, step, time_ns, kind = columns[:VALUES_AT]
    scope, keyset, lengths = np.zeros((3, len(kinds)), np.int64)
    for number in np.flatnonzero(np.bincount(kind)).tolist():
        one = kinds[number]
        scope[number], lengths[number] = scope_of(one.scope), len(one.keys)
        keyset[number] = -1 if one.part else keyset_of(one.keys)
    scope, keyset, lengths = scope[kind], keyset[kind], lengths[kind]
    storable = (keyset >= 0) & (keyset < 10**KEYSET_DIGITS) & (batch >= 0)
    follows = _goes_on(scope, epoch, batch, time_ns)
    follows &= (step[1:] - step[:-1] == batch[1:] - batch[:-1]) & (seq[1:] >= seq[:-1])
    for first, beyond in _runs(storable, follows):
        run = slice(first, beyond)
        length = int(lengths[run].max())
        numbers = columns[VALUES_AT : VALUES_AT + length, run].view(np.float64)
        numbers[np.isnan(numbers)] = np.nan  # of one kind, which is not that of a loss that has not come yet
        lead, span = (_width(column[beyond - 1] - column[first]) for column in (time_ns, seq))
        record = lead + span + BATCH_DIGITS + KEYSET_DIGITS + length * NUMBER_DIGITS
        pieces = _Pieces(beyond - first, record)
        pieces.put(lead, pieces.since(time_ns[run]))
        pieces.put(span, pieces.since(seq[run]))
        pieces.put(8, pieces.since(batch[run]) * 10**KEYSET_DIGITS + keyset[run])
        for value in numbers:
            pieces.put_numbers(value.view(np.int64))
        found = []
        for begin, end, digits in pieces.digits():
            at = first + begin
            found.append(
                MetricBlock(
                    rows=end - begin,
                    scope=int(scope[at]),
                    epoch=int(epoch[at]),
                    seq=int(seq[at]),
                    batch=int(batch[at]),
                    step=int(step[at]),
                    time_ns=int(time_ns[at]),
                    length=length,
                    lead=lead,
                    span=span,
                    record=record,
                    data=digits,
                )
            )
        yield first, beyond, found


def _goes_on(scope: np.ndarray, epoch: np.ndarray, batch: np.ndarray, time_ns: np.ndarray) -> np.ndarray:
    """Of each row but the first: is it of the scope and epoch of the one before, its batch or the next, not sooner?"""
    batches = batch[1:] - batch[:-1]
    found: np.ndarray = (batches == 0) | (batches == 1)
    found &= (scope[1:] == scope[:-1]) & (epoch[1:] == epoch[:-1]) & (time_ns[1:] >= time_ns[:-1])
    return found


def _runs(storable: np.ndarray, follows: np.ndarray) -> list[tuple[int, int]]:
    """Where enough rows follow each other: from which, and to before which."""
    if not len(storable):
        return []
    linked = follows & storable[1:] & storable[:-1]
    ends = [*(np.flatnonzero(~linked) + 1).tolist(), len(storable)]
    return [
        (first, end) for first, end in zip([0, *ends], ends, strict=False) if end - first >= packed.LEAST_ROWS
    ]


class _Pieces:
    """Rows as decimal digits, cut into blocks of nearly one size."""

    def __init__(self, rows: int, record: int) -> None:
        number = -(-rows // min(BLOCK_ROWS, _MOST_DIGITS // record))
        self._size = -(-rows // number)
        self._firsts = np.repeat(np.arange(0, rows, self._size), self._size)[:rows]
        self._eights = np.empty((record // 8, rows), np.uint64)
        self._filled = 0

    def since(self, values: np.ndarray) -> np.ndarray:
        """How much more they are than in the first row of their block."""
        more: np.ndarray = values - values[self._firsts]
        return more

    def put(self, digits: int, *columns: np.ndarray) -> None:
        """What comes next in each row: a number of 8 or 16 digits from each of the columns."""
        for column in columns:
            lower = self._eights[self._filled + (digits > 8)]
            lower[:] = column
            if digits > 8:
                upper = self._eights[self._filled]
                np.floor_divide(lower, _UPPER, out=upper)
                lower -= upper * _UPPER
            self._filled += digits // 8

    def put_numbers(self, bits: np.ndarray) -> None:
        """What comes next in each row: a double, given as its bits in an integer."""
        self.put(EXPONENT_DIGITS, bits >> 52 & 0xFFF)
        self.put(MANTISSA_DIGITS, bits & ((1 << 52) - 1))

    def digits(self) -> Iterator[tuple[int, int, bytes]]:
        """Of each block its rows, from which to before which, and their digits."""
        rows = np.ascontiguousarray(_ascii(self._eights).T)
        for start in range(0, len(rows), self._size):
            some = rows[start : start + self._size]
            yield start, start + len(some), some.tobytes()


_UPPER = np.uint64(10**8)


def _ascii(numbers: np.ndarray) -> np.ndarray:
    """The eight decimal digits of each, as eight bytes; all digits of all numbers are worked out side by side.

    Numbers side by side are parted into quotients and, so many bits above, remainders `n - by * quotient`, three times.
    """
    found: np.ndarray = numbers << 32
    quotients = numbers // 10_000
    quotients *= (10_000 << 32) - 1
    found -= quotients
    # A hundredth of numbers of four digits is `times` as much, without the lowest bits; a tenth of those of two too.
    for by, bits, times, lowest, mask in (
        (100, 16, 10_486, 20, 0x7F_0000_007F),
        (10, 8, 103, 10, 0xF_000F_000F_000F),
    ):
        np.multiply(found, times, out=quotients)
        quotients >>= lowest
        quotients &= mask
        quotients *= (by << bits) - 1
        found <<= bits
        found -= quotients
    found += 0x3030_3030_3030_3030
    return found.astype("<u8", copy=False)


def _width(most: int) -> int:
    """Digits that are room enough."""
    return 8 if most < _UPPER else 16


_PENDING_BITS = int(np.array(PENDING, "<f8").view("<i8"))
