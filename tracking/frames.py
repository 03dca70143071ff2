"""How transitions lie in the flight recorder: frames of up to 8 consecutive ones that share a batch and a phase.

A frame is 128 bytes, 16 words of 8::

    0      q    seq of the first transition
    1, 2   q    epoch, batch
    3      q    bits 0 to 15: scope; 16 to 31: how many frames of text follow; 32: the loss came late; 40 to 55: phase
    4-11   q    a transition each, 0 where there is none yet: its arc and 1 in the highest byte; below, when it was
                complete, in ns since the recorder's beginning
    12     d    loss of its one `forward`
    13     q    when the first transition began: bits 0 to 55 of a time; each other began when the one before was
                complete

A transition that continues a frame is one store. A note is in frames of text after a frame of its own::

    0      q    seq of the transition
    3      q    bits 0 to 15: all ones; 16 to 31: number of bytes
    4-15        UTF-8
"""

import math
import struct
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ARC_AT",
    "BEGAN",
    "BEGIN",
    "FRAME",
    "LATE",
    "LOSS",
    "MAX_NOTE_BYTES",
    "MOST_FRAMES",
    "NS",
    "PENDING",
    "PHASE_AT",
    "SIZE",
    "STEPS",
    "STEPS_IN_A_FRAME",
    "TAGS",
    "TEXT",
    "TO_LOSS",
    "WORDS",
    "Record",
    "arc_of",
    "arcs_of",
    "decode",
    "duration",
    "is_pending",
    "is_text",
    "phase_of",
    "scope_of",
    "stamp",
    "tags_of",
    "texts",
    "texts_after",
]

SIZE = 128
WORDS = SIZE // 8
TAGS, STEPS, LOSS, BEGAN = 3, 4, 12, 13
"""Words of a frame."""
STEPS_IN_A_FRAME = TO_LOSS = LOSS - STEPS
"""The second: from a frame's first transition to its loss."""
LATE = 1 << 32
PHASE_AT = 40
ARC_AT = 56
"""Bits of tags, and of a transition."""
NS = (1 << ARC_AT) - 1
"""The bits of a transition's time: enough for two years and a quarter."""
TEXT = 0xFFFF
"""In a scope's place: the frame holds text."""

Tags = TypeVar("Tags", int, "np.ndarray")
"""Those of a frame, or of many."""

BEGIN = struct.Struct("<qqqqq56xdq16x")
"""A frame with its first transition: seq, epoch, batch, tags, transition, loss, began."""
FRAME = struct.Struct("<4q8qdq16x")
"""Its words but for the last two, which are nothing."""

_TEXT = struct.Struct("<q16xq96s")
_TEXT_BYTES = 96
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
    return scope_of(tags) == TEXT


def texts(seq: int, note: bytes) -> list[bytes]:
    """The frames of text that hold a note of at most `MAX_NOTE_BYTES`."""
    pieces = [note[at : at + _TEXT_BYTES] for at in range(0, len(note), _TEXT_BYTES)]
    return [_TEXT.pack(seq, TEXT | len(piece) << 16, piece) for piece in pieces]


def stamp(arc: int) -> int:
    """What makes a transition of a number of ns, added to it."""
    return arc + 1 << ARC_AT


def arc_of(word: int) -> int:
    """The arc of a transition."""
    return (word >> ARC_AT & 0xFF) - 1


def duration(first: int, began: int) -> int:
    """How long the first transition of a frame took, in ns, from the words of itself and of when it began."""
    ns = first - began & NS
    return ns - ((ns & 1 << ARC_AT - 1) << 1)


def arcs_of(frame: bytes) -> bytes:
    """Of the transitions of a frame the arcs and 1, then zeros: one byte each."""
    return frame[STEPS * 8 + 7 : LOSS * 8 : 8]


def tags_of(frame: bytes) -> int:
    """The tags of a frame."""
    return int.from_bytes(frame[TAGS * 8 : TAGS * 8 + 8], "little")


def scope_of(tags: Tags) -> Tags:
    """The scope of a frame with these tags; `TEXT` where it holds text, and no transitions."""
    return tags & 0xFFFF


def texts_after(tags: Tags) -> Tags:
    """How many frames of text follow a frame with these tags; of one of text, its bytes."""
    return tags >> 16 & 0xFFFF


def phase_of(tags: Tags) -> Tags:
    """The phase of a frame with these tags."""
    return tags >> PHASE_AT & 0xFFFF


def decode(data: bytes, forwards: Collection[int], since_ns: int) -> Iterator[tuple[list[Record], bool]]:
    """For each frame in `data` its transitions, and whether its loss came late.

    `forwards` are the arcs with a loss; the recorder began at `since_ns`, ns since 1970.
    """
    for offset in range(0, len(data), SIZE):
        words = FRAME.unpack_from(data, offset)
        seq, epoch, batch, tags = words[:STEPS]
        if is_text(tags):
            continue
        scope, length, phase, loss = scope_of(tags), texts_after(tags), phase_of(tags), words[LOSS]
        note = _note(data, offset + SIZE, seq, length) if length else ""
        found: list[Record] = []
        began = since_ns + (words[STEPS] & NS) - duration(words[STEPS], words[BEGAN])
        for at, step in enumerate(words[STEPS:LOSS]):
            if not step:
                break
            arc, time_ns = arc_of(step), since_ns + (step & NS)
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
        found += text[: texts_after(tags)]
    return found.decode(errors="ignore")  # a note that was cut may end in half a character
