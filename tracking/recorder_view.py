"""The flight recorder as read from outside, at any time, also after its process was killed."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from states.table import Trigger
from tracking.frames import MOST_FRAMES, SIZE, STEPS_IN_A_FRAME, Record, decode
from tracking.recorder import HEAD_AT, HEADER, JSON_AT, MAGIC, VERSION, RecorderError

__all__ = ["RecorderDamagedError", "RecorderView", "read_recorder"]


class RecorderDamagedError(RecorderError):
    """A file that should be a flight recorder is not, or not a whole one."""


@dataclass(frozen=True)
class RecorderView:
    """A flight recorder as read from outside: its header and the transitions it still holds.

    It began at `since_ns`, ns since 1970. `records` go up in seq, drained ones included. `arcs` holds (trigger, source,
    dest) by name for each code, as the process that recorded numbered them. `damaged` counts frames that made no sense,
    as after a power cut.
    """

    path: Path
    attempt: int
    since_ns: int
    first_seq: int
    next_seq: int
    capacity: int
    scopes: tuple[str, ...]
    phases: tuple[str, ...]
    arcs: tuple[tuple[str, str, str], ...]
    records: tuple[Record, ...]
    late: frozenset[int]
    damaged: int

    @property
    def forwards(self) -> frozenset[int]:
        """The codes of the arcs that carry a loss."""
        return _forwards(self.arcs)


def _forwards(arcs: tuple[tuple[str, str, str], ...]) -> frozenset[int]:
    return frozenset(code for code, arc in enumerate(arcs) if arc[0] == Trigger.FORWARD.value)


def read_recorder(path: Path | str, newest: int | None = None) -> RecorderView:
    """Read a flight recorder from outside: at any time, also after its process was killed.

    Of `newest` only so many frames are read (most hold a batch): a full ring takes a third of a second.
    Raises FileNotFoundError if there is none, RecorderDamagedError if the file is not a whole recorder.
    """
    path = Path(path)
    # Read, not mapped: a mapped file that somebody cuts short kills its reader with SIGBUS.
    with path.open("rb", buffering=0) as file:
        head_of_file = file.read(JSON_AT)
        if len(head_of_file) < JSON_AT:
            raise _damaged(path, f"found {len(head_of_file)} bytes, expected a header of {JSON_AT}")
        magic, version, ring, attempt, capacity, first_seq, length, crc, since_ns = HEADER.unpack_from(
            head_of_file
        )
        if magic != MAGIC:
            raise _damaged(path, f"it begins with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise RecorderError(
                f"{path}: found recorder layout {version}, expected {VERSION}; "
                "use the interlock it was made with"
            )
        size, expected = os.fstat(file.fileno()).st_size, ring + capacity * SIZE
        if not (0 < capacity <= 1 << 32 and size == expected):
            raise _damaged(path, f"found {size} bytes, expected {expected}")
        text = os.pread(file.fileno(), length, JSON_AT)
        if zlib.crc32(text) != crc:
            raise _damaged(path, "the checksum of its lists of scopes and phases is wrong")
        lists = json.loads(text)
        head, _ = _ends(file.fileno(), path, capacity)
        start = max(0, head - (capacity if newest is None else min(newest, capacity)))
        data = _unrolled(file.fileno(), path, ring, start, head, capacity)
        after, tail = _ends(file.fileno(), path, capacity)
    # While we read, the loop may have overwritten drained frames up to those of the transition it is at.
    first = min(head, max(start, min(tail, after + MOST_FRAMES - capacity)))
    arcs = tuple((arc[0], arc[1], arc[2]) for arc in lists["arcs"])
    records, late, bad = _sensible(
        data[(first - start) * SIZE :],
        range(first_seq, first_seq + head * STEPS_IN_A_FRAME),
        arcs,
        (len(lists["scopes"]), len(lists["phases"])),
        since_ns,
    )
    return RecorderView(
        path=path,
        attempt=attempt,
        since_ns=since_ns,
        first_seq=first_seq,
        next_seq=records[-1].seq + 1 if records else first_seq,
        capacity=capacity,
        scopes=tuple(lists["scopes"]),
        phases=tuple(lists["phases"]),
        arcs=arcs,
        records=tuple(records),
        late=frozenset(late),
        damaged=bad,
    )


def _damaged(path: Path, what: str) -> RecorderDamagedError:
    return RecorderDamagedError(f"{path} is not a whole flight recorder: {what}")


def _ends(file: int, path: Path, capacity: int) -> tuple[int, int]:
    raw = os.pread(file, 72, HEAD_AT)
    if len(raw) < 72:
        raise _damaged(path, "it was cut short while being read")
    head, tail = (int.from_bytes(raw[at : at + 8], "little", signed=True) for at in (0, 64))
    # Tail is read with head, in one call; a drain in between may put it at a later head.
    if min(head, tail) < 0 or head - tail > capacity:
        raise _damaged(path, f"head {head} and tail {tail} do not fit a ring of {capacity} frames")
    return head, tail


def _unrolled(file: int, path: Path, ring: int, first: int, head: int, capacity: int) -> bytes:
    """The frames from position `first` to `head`, in order."""
    if first == head:
        return b""
    start, stop = first % capacity * SIZE, head % capacity * SIZE
    pieces = [(start, stop)] if start < stop else [(start, capacity * SIZE), (0, stop)]
    data = b"".join(os.pread(file, end - begin, ring + begin) for begin, end in pieces)
    if len(data) != (head - first) * SIZE:
        raise _damaged(path, "it was cut short while being read")
    return data


def _sensible(
    data: bytes, seqs: range, arcs: tuple[tuple[str, str, str], ...], limits: tuple[int, int], since_ns: int
) -> tuple[list[Record], set[int], int]:
    """The records whose numbers make sense and go up, the seqs with a late loss, how many frames do not."""
    forwards, (scopes, phases) = _forwards(arcs), limits
    records: list[Record] = []
    late: set[int] = set()
    newest, bad = seqs.start - 1, 0
    for found, came_late in decode(data, forwards, since_ns):
        if not found or not all(
            newest < seq < seqs.stop and 0 <= arc < len(arcs) and scope < scopes and phase < phases
            for seq, arc, scope, phase, *_ in found
        ):
            bad += 1
            continue
        newest = found[-1].seq
        records += found
        if came_late:
            late.update(record.seq for record in found if record.arc in forwards)
    return records, late, bad
