"""How transitions lie in the flight recorder: frames of up to 8 consecutive ones that share a batch.

A frame is 192 bytes, 24 words of 8::

    0      q    seq of the first transition
    1, 2   q    epoch, batch
    3      q    bits 0 to 15: scope; 16 to 31: how many frames of text follow; 32: the loss came late
    4-11   q    a transition each, 0 where there is none yet: bits 0 to 15: arc; 16 to 31: phase; 32: 1
    12-19  q    when it was complete, in ns since 1970
    20     d    loss of its one `forward`
    21     q    how long the first transition took, in ns; each other began when the one before was complete

A transition that continues a frame is two stores, its time and then itself. A reader who copies forwards, as
`read(2)` does, therefore finds the time of each that it finds. A note is in frames of text after a frame of its own::

    0      q    seq of the transition
    3      q    bits 0 to 15: all ones; 16 to 31: number of bytes
    4-23        UTF-8
"""

import math
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

__all__ = [
    "BEGIN",
    "FRAME",
    "LATE",
    "LOSS",
    "MAX_NOTE_BYTES",
    "MOST_FRAMES",
    "PENDING",
    "PRESENT",
    "SIZE",
    "STEPS",
    "STEPS_IN_A_FRAME",
    "TAGS",
    "TIMES",
    "TO_LOSS",
    "TO_TIME",
    "WORDS",
    "Record",
    "decode",
    "is_pending",
    "is_text",
    "texts",
]

SIZE = 192
WORDS = SIZE // 8
TAGS, STEPS, TIMES, LOSS = 3, 4, 12, 20
"""Words of a frame."""
STEPS_IN_A_FRAME = TO_TIME = TIMES - STEPS
"""The second: from a transition to its time."""
TO_LOSS = LOSS - STEPS
"""From a frame's first transition to its loss."""
PRESENT = 1 << 32
LATE = 1 << 32
_LOW = 0xFFFF

BEGIN = struct.Struct("<qqqqq56xq56xdq16x")
"""A frame with its first transition: seq, epoch, batch, tags, step, time, loss, duration."""
FRAME = struct.Struct("<4q8q8qdq16x")
"""Its words but for the last two, which are nothing."""

_TEXT = struct.Struct("<q16xq160s")
_TEXT_BYTES = 160
MAX_NOTE_BYTES = 4080
"""A longer note is cut (UTF-8 bytes)."""
MOST_FRAMES = 1 - (-MAX_NOTE_BYTES // _TEXT_BYTES)
"""That one transition can take."""

PENDING: float = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_1C0C_0DE5))[0]
"""The loss of a `forward` that is still on its way from a device: a NaN with a payload of its own."""
_PENDING_BITS = struct.pack("<d", PENDING)


class Record(NamedTuple):
    """One transition as the recorder holds it; `arc`, `scope` and `phase` index the recorder's lists.

    `time_ns` is since 1970, `duration_ns` what the transition took. `loss` is NaN where there is none,
    unless the arc is a `forward`: there NaN is the loss (see `is_pending` for one that has not come yet).
    """

    seq: int
    arc: int
    scope: int
    phase: int
    epoch: int
    batch: int
    time_ns: int
    duration_ns: int
    loss: float
    note: str = ""


def is_pending(loss: float) -> bool:
    """Is this the mark of a loss that is still on its way, and not a NaN that was computed?"""
    return math.isnan(loss) and struct.pack("<d", loss) == _PENDING_BITS


def is_text(tags: int) -> bool:
    """Does a frame with these tags hold text, and no transitions?"""
    return tags & _LOW == _LOW


def texts(seq: int, note: bytes) -> list[bytes]:
    """The frames of text that hold a note of at most `MAX_NOTE_BYTES`."""
    pieces = [note[at : at + _TEXT_BYTES] for at in range(0, len(note), _TEXT_BYTES)]
    return [_TEXT.pack(seq, _LOW | len(piece) << 16, piece) for piece in pieces]


def decode(data: bytes, forwards: Collection[int]) -> Iterator[tuple[list[Record], bool]]:
    """For each frame in `data` its transitions, and whether its loss came late. `forwards` are the arcs with a loss."""
    for offset in range(0, len(data), SIZE):
        words = FRAME.unpack_from(data, offset)
        seq, epoch, batch, tags = words[:STEPS]
        if is_text(tags):
            continue
        scope, length, loss = tags & _LOW, tags >> 16 & _LOW, words[LOSS]
        note = _note(data, offset + SIZE, seq, length) if length else ""
        found: list[Record] = []
        began = words[TIMES] - words[LOSS + 1]
        for at in range(STEPS_IN_A_FRAME):
            step, time_ns = words[STEPS + at], words[TIMES + at]
            if not step & PRESENT:
                break
            arc, phase = step & _LOW, step >> 16 & _LOW
            its_loss = loss if arc in forwards else math.nan
            found.append(
                Record(seq + at, arc, scope, phase, epoch, batch, time_ns, time_ns - began, its_loss, note)
            )
            began = time_ns
        yield found, bool(tags & LATE)


def _note(data: bytes, offset: int, seq: int, length: int) -> str:
    found = b""
    for at in range(offset, min(offset + length * SIZE, len(data)), SIZE):
        of, tags, text = _TEXT.unpack_from(data, at)
        if of != seq or not is_text(tags):
            break
        found += text[: tags >> 16 & _LOW]
    return found.decode(errors="ignore")  # a note that was cut may end in half a character
