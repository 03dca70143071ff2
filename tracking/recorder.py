"""The flight recorder: the newest transitions in mapped memory, readable after a kill.

The file is a header, a JSON area, and a ring of 64-byte slots::

    0     8s  magic
    8     I   version of this layout
    12    I   offset of the ring, in bytes
    16    q   attempt
    24    q   capacity of the ring, in slots
    32    q   seq of the attempt's first transition
    40    II  length and CRC-32 of the JSON area, which begins at 192
    64    q   head: slots written since the attempt began
    128   q   tail: slots that the journal holds durably

A transition is one slot, and as many continuation slots after it as its note needs. Slots are written
first, and then committed by one 8-byte store of the head. The pages belong to the kernel's page cache:
what was committed is there after the process was killed, and anybody may read it at any time. Slots from
tail to head are never overwritten; older ones are, and the seq in each slot tells a reader which.
"""

import json
import math
import mmap
import os
import struct
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from states.errors import InterlockError
from states.table import ARCS, Trigger
from tracking.forks import forget_in_children

__all__ = [
    "MAX_NOTE_BYTES",
    "PENDING",
    "Chunk",
    "Record",
    "Recorder",
    "RecorderDamagedError",
    "RecorderError",
    "RecorderView",
    "Slot",
    "is_pending",
    "read_recorder",
]

_MAGIC = b"ILKRECRD"
_VERSION = 1
_HEADER = struct.Struct("<8sIIqqqII")
_HEAD_AT, _TAIL_AT, _JSON_AT = 64, 128, 192

# seq, arc, scope, phase, continuation slots, flags, epoch, batch, time_ns, duration_ns, loss
_SLOT = struct.Struct("<qHHHBBqqqqd8x")
_PLAIN = struct.Struct("<qHHHxxqqqqd8x")  # the same for a transition without a note
_SIZE = _SLOT.size
_FLAGS_OFFSET, _LOSS_OFFSET = 15, 48
_LATE = 1  # flag: the loss came after the transition was recorded

_CONTINUATION = 0xFFFF  # in place of the arc
_TEXT = struct.Struct("<qHHHBB48s")  # seq, _CONTINUATION, number of bytes in this slot
_TEXT_BYTES = 48
MAX_NOTE_BYTES = 4080
"""A longer note is cut (UTF-8 bytes)."""
_MOST_SLOTS = 1 + MAX_NOTE_BYTES // _TEXT_BYTES  # that one transition can take

PENDING: float = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_1C0C_0DE5))[0]
"""The loss of a `forward` that is still on its way from a device: a NaN with a payload of its own."""
_PENDING_BITS = struct.pack("<d", PENDING)

_FORWARD_ARCS = frozenset(code for code, arc in enumerate(ARCS) if arc.trigger is Trigger.FORWARD)

Slot = tuple[int, int, int, int, int, int, int, int, int, int, float]
"""One slot as stored: seq, arc, scope, phase, continuations, flags, epoch, batch, time, duration, loss."""


class RecorderError(InterlockError):
    """The flight recorder cannot be made or used."""


class RecorderDamagedError(RecorderError):
    """A file that should be a flight recorder is not, or not a whole one."""


class Record(NamedTuple):
    """One transition as the recorder holds it; `arc`, `scope` and `phase` index the view's lists.

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


class Chunk:
    """What was recorded, as it is stored; decoded as far as somebody asks."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bool__(self) -> bool:
        return bool(self.data)

    @cached_property
    def slots(self) -> list[Slot]:
        """Slots in the order of recording, one for each transition."""
        return [slot for slot in _SLOT.iter_unpack(self.data) if slot[1] != _CONTINUATION]

    @cached_property
    def notes(self) -> dict[int, str]:
        """The notes, by seq."""
        return _notes(self.data) if self.noted else {}

    @property
    def noted(self) -> bool:
        """Whether any transition has a note, so that there are slots that are none."""
        last = _SLOT.unpack_from(self.data, len(self.data) - _SIZE)[0] if self.data else 0
        return bool(self.data) and (last - self.first + 1) * _SIZE != len(self.data)

    @property
    def first(self) -> int:
        """The seq of the first transition."""
        return int(_SLOT.unpack_from(self.data)[0])


class Recorder:
    """The loop's side of the flight recorder: `record` and, in another thread, the drain.

    Invariant: everything from tail to head is whole, and was committed in the order of its seq.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, *, attempt: int, first_seq: int, capacity: int):
        self.path = path
        self.attempt = attempt
        self.capacity = capacity
        self.on_full: Callable[[], None] = _wait_a_little
        """Called again and again while the ring is full; may raise to end the wait."""
        self._map = mapped
        self._view = memoryview(mapped)
        # Casts of aligned parts: an item store through them is one machine store, never half a number.
        self._heads = self._view[_HEAD_AT : _HEAD_AT + 8].cast("q")
        self._tails = self._view[_TAIL_AT : _TAIL_AT + 8].cast("q")
        self._ring = _HEADER.unpack_from(mapped)[2]
        self._losses = self._view[self._ring :].cast("d")
        self._mask = capacity - 1
        self._head = 0
        self._seq = self._first_seq = first_seq
        self._limit = capacity - _MOST_SLOTS
        # Where notes shift the slots: from seq _shift_seqs[i] on, position = seq + _shifts[i].
        self._shift_seqs = [first_seq]
        self._shifts = [-first_seq]
        forget_in_children(self)

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        attempt: int,
        next_seq: int,
        scopes: Sequence[str],
        phases: Sequence[str],
        capacity: int = 65536,
    ) -> "Recorder":
        """Make the ring of a new attempt, in place of that of the attempt before, which is drained by now.

        `capacity` is in transitions and a power of two, at least 256. The space is allocated at once.
        Raises RecorderError when it cannot be (a full disk, a folder that cannot be written).
        """
        path = Path(path)
        if capacity < 256 or capacity & (capacity - 1):
            raise RecorderError(f"recorder capacity: found {capacity}, expected a power of two, at least 256")
        header, ring = _header(attempt, next_seq, list(scopes), list(phases), capacity)
        fresh = path.with_name(path.name + ".new")
        try:
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                # A hole in the file would be filled when it is first stored to; with the disk full then,
                # the kernel answers with SIGBUS. So the space is taken here.
                os.posix_fallocate(file, 0, ring + capacity * _SIZE)
                os.pwrite(file, header, 0)
                mapped = mmap.mmap(file, ring + capacity * _SIZE)
            finally:
                os.close(file)
            os.rename(fresh, path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise RecorderError(
                f"{path}: cannot allocate a flight recorder of {capacity * _SIZE >> 20} MiB ({error}); "
                "free some space, or choose a root that can be written"
            ) from error
        return cls(path, mapped, attempt=attempt, first_seq=next_seq, capacity=capacity)

    @property
    def next_seq(self) -> int:
        """The seq that the next transition will get."""
        return self._seq

    @property
    def fill(self) -> float:
        """How much of the ring waits to be drained: at 1 `record` waits."""
        return float((self._heads[0] - self._tails[0]) / (self.capacity - _MOST_SLOTS))

    @property
    def closed(self) -> bool:
        """Is it unmapped?"""
        return self._map.closed

    def record(
        self,
        arc: int,
        scope: int,
        phase: int,
        epoch: int,
        batch: int,
        time_ns: int,
        duration_ns: int,
        loss: float,
        note: str = "",
    ) -> int:
        """Write down one completed transition and return its seq; when this returns, a kill cannot undo it.

        Waits while the ring is full (see `on_full`).
        """
        position = self._head
        if note or position >= self._limit:
            return self._record_rarely(
                arc, scope, phase, epoch, batch, time_ns, duration_ns, loss, note.encode()[:MAX_NOTE_BYTES]
            )
        seq = self._seq
        _pack_plain(
            self._map,
            self._ring + ((position & self._mask) << 6),
            seq,
            arc,
            scope,
            phase,
            epoch,
            batch,
            time_ns,
            duration_ns,
            loss,
        )
        self._seq = seq + 1
        self._head = self._heads[0] = position + 1  # the commit
        return seq

    def set_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of an earlier `forward`, if its slot has not been overwritten.

        Raises ValueError if `seq` is no `forward`, or was never recorded.
        """
        if not self._first_seq <= seq < self._seq:
            raise ValueError(f"set_loss: seq {seq} was not recorded in this attempt")
        if seq < self._shift_seqs[0]:
            return
        position = seq + self._shifts[bisect_right(self._shift_seqs, seq) - 1]
        offset = self._ring + ((position & self._mask) << 6)
        found, arc = _SEQ_ARC.unpack_from(self._map, offset)
        if found != seq:
            return
        if arc not in _FORWARD_ARCS:
            raise ValueError(f"set_loss: transition {seq} is a {ARCS[arc].trigger.value!r}, not a 'forward'")
        self._losses[((position & self._mask) << 3) + _LOSS_OFFSET // 8] = loss
        self._map[offset + _FLAGS_OFFSET] = _LATE

    def take(self) -> tuple[Chunk, int]:
        """What has not been drained, and the position to hand to `release` when it is durable elsewhere."""
        tail, head = self._tails[0], self._heads[0]
        return Chunk(self._copy(tail, head)), head

    def release(self, position: int) -> None:
        """Everything before `position` is durable elsewhere; its slots may be overwritten."""
        self._tails[0] = position

    def close(self) -> None:
        """Unmap the file. What it holds stays readable; `record` raises RecorderError from now on."""
        self._limit = -1  # sends `record` the long way round, where it is told
        for view in (self._heads, self._tails, self._losses, self._view):
            view.release()
        self._map.close()

    def forget(self) -> None:
        """In a forked child the ring is the parent's still: unmap it, so that nothing can write to it."""
        self.close()

    def _record_rarely(
        self,
        arc: int,
        scope: int,
        phase: int,
        epoch: int,
        batch: int,
        time_ns: int,
        duration_ns: int,
        loss: float,
        note: bytes,
    ) -> int:
        self._wait_for_room()
        seq, position = self._seq, self._head
        pieces = [note[at : at + _TEXT_BYTES] for at in range(0, len(note), _TEXT_BYTES)]
        slot = self._ring + ((position & self._mask) << 6)
        _SLOT.pack_into(
            self._map,
            slot,
            seq,
            arc,
            scope,
            phase,
            len(pieces),
            0,
            epoch,
            batch,
            time_ns,
            duration_ns,
            loss,
        )
        for at, piece in enumerate(pieces, position + 1):
            slot = self._ring + ((at & self._mask) << 6)
            _TEXT.pack_into(self._map, slot, seq, _CONTINUATION, 0, 0, len(piece), 0, piece)
        self._seq = seq + 1
        self._head = self._heads[0] = position + 1 + len(pieces)
        if pieces:
            self._shift_seqs.append(seq + 1)
            self._shifts.append(self._head - seq - 1)
            self._forget_old_shifts()
        return seq

    def _wait_for_room(self) -> None:
        # _limit is kept so low that one transition with the longest note fits whenever head < _limit.
        while True:
            if self._map.closed:
                raise RecorderError(
                    f"{self.path}: found this recorder closed (or made by the process that forked this one)"
                )
            self._limit = self._tails[0] + self.capacity - _MOST_SLOTS
            if self._head < self._limit:
                return
            self.on_full()

    def _forget_old_shifts(self) -> None:
        if len(self._shift_seqs) > self.capacity:
            oldest = self._head - self.capacity
            keep = next(i for i, seq in enumerate(self._shift_seqs) if seq + self._shifts[i] >= oldest) - 1
            del self._shift_seqs[: max(keep, 0)], self._shifts[: max(keep, 0)]

    def _copy(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        first, last = start & self._mask, stop & self._mask
        ring = self._ring
        if first < last:
            return self._map[ring + first * _SIZE : ring + last * _SIZE]
        return self._map[ring + first * _SIZE :] + self._map[ring : ring + last * _SIZE]


_pack_plain = _PLAIN.pack_into
_SEQ_ARC = struct.Struct("<qH")


def _wait_a_little() -> None:
    time.sleep(0.0005)


def _header(
    attempt: int, first_seq: int, scopes: list[str], phases: list[str], capacity: int
) -> tuple[bytes, int]:
    # The arcs are written out: a later version may number them differently, and still has to drain this.
    arcs = [[arc.trigger.value, arc.source.value, arc.dest.value] for arc in ARCS]
    text = json.dumps({"scopes": scopes, "phases": phases, "arcs": arcs}).encode()
    ring = -(-(_JSON_AT + len(text)) // mmap.PAGESIZE) * mmap.PAGESIZE
    header = bytearray(_JSON_AT + len(text))
    _HEADER.pack_into(
        header, 0, _MAGIC, _VERSION, ring, attempt, capacity, first_seq, len(text), zlib.crc32(text)
    )
    header[_JSON_AT:] = text
    return bytes(header), ring


def _notes(data: bytes) -> dict[int, str]:
    pieces: dict[int, bytes] = {}
    for seq, arc, _, _, length, _, text in _TEXT_SLOT.iter_unpack(data):
        if arc == _CONTINUATION:
            pieces[seq] = pieces.get(seq, b"") + text[:length]
    # A note cut at MAX_NOTE_BYTES may end in half a character.
    return {seq: text.decode(errors="ignore") for seq, text in pieces.items()}


_TEXT_SLOT = struct.Struct("<qHHHBB48s")


@dataclass(frozen=True)
class RecorderView:
    """A flight recorder as read from outside: its header and the transitions it still holds.

    `records` go up in seq, drained ones included. `arcs` holds (trigger, source, dest) by name for each
    code, as the process that recorded numbered them. `damaged` counts slots that made no sense, as after
    a power cut.
    """

    path: Path
    attempt: int
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
        return frozenset(code for code, arc in enumerate(self.arcs) if arc[0] == Trigger.FORWARD.value)


def read_recorder(path: Path | str) -> RecorderView:
    """Read a flight recorder from outside: at any time, also after its process was killed.

    Raises FileNotFoundError if there is none, RecorderDamagedError if the file is not a whole recorder.
    """
    path = Path(path)
    # Read, not mapped: a mapped file that somebody cuts short kills its reader with SIGBUS.
    with path.open("rb", buffering=0) as file:
        head_of_file = file.read(_JSON_AT)
        if len(head_of_file) < _JSON_AT:
            raise _damaged(path, f"found {len(head_of_file)} bytes, expected a header of {_JSON_AT}")
        magic, version, ring, attempt, capacity, first_seq, length, crc = _HEADER.unpack_from(head_of_file)
        if magic != _MAGIC:
            raise _damaged(path, f"it begins with {magic!r}, expected {_MAGIC!r}")
        if version != _VERSION:
            raise RecorderError(
                f"{path}: found recorder layout {version}, expected {_VERSION}; "
                "use the interlock it was made with"
            )
        size, expected = os.fstat(file.fileno()).st_size, ring + capacity * _SIZE
        if not (0 < capacity <= 1 << 32 and size == expected):
            raise _damaged(path, f"found {size} bytes, expected {expected}")
        text = os.pread(file.fileno(), length, _JSON_AT)
        if zlib.crc32(text) != crc:
            raise _damaged(path, "the checksum of its lists of scopes and phases is wrong")
        lists = json.loads(text)
        head, _ = _ends(file.fileno(), path, capacity)
        data = os.pread(file.fileno(), capacity * _SIZE, ring)
        if len(data) != capacity * _SIZE:
            raise _damaged(path, "it was cut short while being read")
        after, tail = _ends(file.fileno(), path, capacity)
    # While we read, the loop may have overwritten drained slots up to those of the transition it is at.
    first = max(0, head - capacity, min(tail, after + _MOST_SLOTS - capacity))
    records, late, bad = _sensible(
        _unrolled(data, first, head, capacity),
        range(first_seq, first_seq + head),
        (len(lists["arcs"]), len(lists["scopes"]), len(lists["phases"])),
    )
    return RecorderView(
        path=path,
        attempt=attempt,
        first_seq=first_seq,
        next_seq=records[-1].seq + 1 if records else first_seq,
        capacity=capacity,
        scopes=tuple(lists["scopes"]),
        phases=tuple(lists["phases"]),
        arcs=tuple((arc[0], arc[1], arc[2]) for arc in lists["arcs"]),
        records=tuple(records),
        late=frozenset(late),
        damaged=bad,
    )


def _damaged(path: Path, what: str) -> RecorderDamagedError:
    return RecorderDamagedError(f"{path} is not a whole flight recorder: {what}")


def _ends(file: int, path: Path, capacity: int) -> tuple[int, int]:
    raw = os.pread(file, 72, _HEAD_AT)
    if len(raw) < 72:
        raise _damaged(path, "it was cut short while being read")
    head, tail = struct.unpack_from("<q", raw)[0], struct.unpack_from("<q", raw, 64)[0]
    # Tail is read with head, in one call; a drain in between may put it at a later head.
    if min(head, tail) < 0 or head - tail > capacity:
        raise _damaged(path, f"head {head} and tail {tail} do not fit a ring of {capacity} slots")
    return head, tail


def _unrolled(data: bytes, first: int, head: int, capacity: int) -> bytes:
    """The slots from position `first` to `head`, in order."""
    if first >= head:
        return b""
    start, stop = first % capacity * _SIZE, head % capacity * _SIZE
    return data[start:stop] if start < stop else data[start:] + data[:stop]


def _sensible(data: bytes, seqs: range, limits: tuple[int, int, int]) -> tuple[list[Record], set[int], int]:
    """The records whose numbers make sense and go up, the seqs with a late loss, how many did not."""
    chunk = Chunk(data)
    arcs, scopes, phases = limits
    records: list[Record] = []
    late: set[int] = set()
    newest = seqs.start - 1
    for slot in chunk.slots:
        seq, arc, scope, phase, _, flags, epoch, batch, time_ns, duration_ns, loss = slot
        if not newest < seq < seqs.stop or arc >= arcs or scope >= scopes or phase >= phases:
            continue
        newest = seq
        note = chunk.notes.get(seq, "")
        records.append(Record(seq, arc, scope, phase, epoch, batch, time_ns, duration_ns, loss, note))
        if flags & _LATE:
            late.add(seq)
    return records, late, len(chunk.slots) - len(records)
