"""The flight recorder: the newest transitions in mapped memory, readable after a kill.

The file is a header, a JSON area, and a ring of frames (see `tracking.frames`)::

    0     8s  magic
    8     I   version of this layout
    12    I   offset of the ring, in bytes
    16    q   attempt
    24    q   capacity of the ring, in frames
    32    q   seq of the attempt's first transition
    40    II  length and CRC-32 of the JSON area, which begins at 192
    48    q   since when its times are counted, in ns since 1970
    64    q   head: frames begun since the attempt began
    128   q   tail: frames that the journal holds durably, and that get no more transitions

A frame is written first, with its first transition, and then committed by one 8-byte store of the head. Those that
follow in it are one store each, which commits them. The pages belong to the kernel's page cache:
what was committed is there after the process was killed, and anybody may read it at any time. Frames from
tail to head are never overwritten; older ones are, and the seq in each frame tells a reader which.
"""

import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from states.errors import InterlockError
from states.table import ARCS, Trigger
from tracking.forks import forget_in_children
from tracking.frames import (
    BEGAN,
    BEGIN,
    LATE,
    LOSS,
    MAX_NOTE_BYTES,
    MOST_FRAMES,
    NS,
    PHASE_AT,
    SIZE,
    STEPS,
    STEPS_IN_A_FRAME,
    TAGS,
    TO_LOSS,
    WORDS,
    Record,
    arc_of,
    arcs_of,
    decode,
    duration,
    is_text,
    scope_of,
    stamp,
    tags_of,
    texts,
)

__all__ = ["FORWARDS", "Chunk", "Line", "Recorder", "RecorderError"]

MAGIC = b"ILKRECRD"
VERSION = 3
HEADER = struct.Struct("<8sIIqqqIIq")
HEAD_AT, TAIL_AT, JSON_AT = 64, 128, 192

FORWARDS = frozenset(code for code, arc in enumerate(ARCS) if arc.trigger is Trigger.FORWARD)
"""The arcs that carry a loss."""

_NONE = float("nan")


class RecorderError(InterlockError):
    """The flight recorder cannot be made or used."""


class Chunk:
    """What was recorded, as it is stored: frames, the first `skip` transitions of which were taken before.

    Their times are counted from `since_ns`, ns since 1970.
    """

    def __init__(self, data: bytes, skip: int, since_ns: int) -> None:
        self.data = data
        self.skip = skip
        self.since_ns = since_ns

    def __bool__(self) -> bool:
        return bool(self.records) if len(self.data) == SIZE else bool(self.data)

    @cached_property
    def records(self) -> list[Record]:
        """The transitions in the order of recording."""
        frames = decode(self.data, FORWARDS, self.since_ns)
        return [record for found, _ in frames for record in found][self.skip :]

    @property
    def first(self) -> int:
        """The seq of the first transition."""
        return int(struct.unpack_from("<q", self.data)[0]) + self.skip


class Place(Protocol):
    """Where a training stands; both count from 0."""

    @property
    def epoch(self) -> int: ...
    @property
    def batch(self) -> int: ...


class Line:
    """The transitions of one scope, as they are made: what cannot continue the newest frame begins one.

    Whoever is in a hurry may continue a frame himself, where `at < end`: store what the recorder's clock reads, and its
    `stamp` of the arc added, at `words[at]`, and add 1 to `at`. A loss goes to `losses[first + TO_LOSS]` before that,
    and only where `free` says that the frame has none. The phase is that of the frame.
    """

    __slots__ = ("_arc", "_mark", "_recorder", "_seq", "at", "end", "first", "free", "scope")

    def __init__(self, recorder: "Recorder", scope: int) -> None:
        self._recorder, self.scope = recorder, scope
        self.at = self.end = self.first = 0
        self.free = False
        self._seq = recorder.next_seq  # of the transition at `first`
        self._arc = -1  # before that
        self._mark = recorder.now()  # when it was complete

    @property
    def seq(self) -> int:
        """The seq of the newest transition; before the first, that of the one before the line began."""
        return self._seq + self.at - self.first - 1

    @property
    def arc(self) -> int:
        """The newest transition; -1 before the first."""
        return arc_of(self._recorder.words[self.at - 1]) if self.at > self.first else self._arc

    @property
    def time_ns(self) -> int:
        """When the newest transition was complete, or the clock restarted."""
        if self.at == self.first:
            return self._mark
        return self._recorder.since_ns + (self._recorder.words[self.at - 1] & NS)

    def restart(self) -> None:
        """What has passed since the newest transition belongs to none."""
        self.leave()
        self._mark = self._recorder.now()

    def lap(self, arc: int, phase: int, epoch: int, batch: int, loss: float = _NONE, note: str = "") -> int:
        """Write down a transition that is complete now; the time in ns since 1970. Waits while the ring is full."""
        time_ns = self._recorder.now()
        self.record(arc, phase, epoch, batch, time_ns, time_ns - self.time_ns, loss, note)
        return time_ns

    def beginner(
        self, arc: int, phase: int, place: Place, record: Callable[[], object]
    ) -> Callable[[], None]:
        """What does as `lap` where `arc`, without loss or note, begins the batch at `place`; else it calls `record`."""
        recorder, of_arc, tags = self._recorder, self._recorder.stamp(arc), phase << PHASE_AT | self.scope
        buffer, ring, mask = recorder.map, recorder.ring, recorder.mask
        words, heads = recorder.words, recorder.heads

        def begin() -> None:
            position = recorder.head
            if not self.end or position >= recorder.limit:
                record()
                return
            at = self.at
            seq = self._seq + at - self.first
            slot = position & mask
            _begin(
                buffer,
                ring + slot * SIZE,
                seq,
                place.epoch,
                place.batch,
                tags,
                _read() + of_arc,
                _NONE,
                words[at - 1],
            )
            heads[0] = recorder.head = position + 1  # the commit
            self._seq = seq
            self.first = first = slot * WORDS + STEPS
            self.at, self.end, self.free = first + 1, first + STEPS_IN_A_FRAME, True

        return begin

    def record(
        self,
        arc: int,
        phase: int,
        epoch: int,
        batch: int,
        time_ns: int,
        duration_ns: int,
        loss: float = _NONE,
        note: str = "",
    ) -> int:
        """Write down one completed transition and return its seq; when this returns, a kill cannot undo it.

        Waits while the ring is full (see `Recorder.on_full`). The loss of what is no `forward` is none.
        Raises ValueError if `time_ns` is not in the two years from when the recorder began.
        """
        recorder, at, carries = self._recorder, self.at, arc in FORWARDS
        words, ns, tags = recorder.words, time_ns - recorder.since_ns, phase << PHASE_AT | self.scope
        if not 0 <= ns <= NS:
            raise ValueError(f"time: found {time_ns} ns, expected {recorder.since_ns} and up to {NS} more")
        step, began = stamp(arc) + ns, ns - duration_ns & NS
        frame = self.first - STEPS
        if (
            at < self.end
            and not note
            and words[frame + 1] == epoch
            and words[frame + 2] == batch
            and words[frame + TAGS] & ~LATE == tags
            and words[at - 1] & NS == began
            and (self.free or not carries)
        ):
            if carries:
                recorder.losses[self.first + TO_LOSS] = loss
                self.free = False
            words[at] = step  # the commit
            self.at = at + 1
        else:
            text = note.encode()[:MAX_NOTE_BYTES]
            slot, seq = recorder.begin(tags, epoch, batch, step, loss, began, text)
            if recorder.newest is not None and recorder.newest is not self:
                recorder.newest.leave()
            recorder.newest = self
            self._seq, self.first = seq, slot * WORDS + STEPS
            self.at, self.free = self.first + 1, not carries
            self.end = self.at if note else self.first + STEPS_IN_A_FRAME
        return self.seq

    def end_frame(self) -> None:
        """The next transition begins a frame, as one with a note must.

        For the loop's thread. From another one it harms no frame, and may miss the transitions up to the next `record`.
        """
        self.end = 0

    def leave(self) -> None:
        """Put nothing more into the frame."""
        if self.at > self.first:
            self._mark, self._arc = self.time_ns, self.arc
            self._seq += self.at - self.first
        self.first, self.end = self.at, 0


class Recorder:
    """The loop's side of the flight recorder: its lines and, in another thread, the drain.

    Invariant: everything from tail to head is whole, and was committed in the order of its seq.
    """

    def __init__(
        self, path: Path, mapped: mmap.mmap, *, attempt: int, first_seq: int, began: int, capacity: int
    ):
        self.path = path
        self.attempt = attempt
        self.capacity = capacity
        self.on_full: Callable[[], None] = _wait_a_little
        """Called again and again while the ring is full; may raise to end the wait."""
        self.map = mapped
        self._view = memoryview(mapped)
        # Casts of aligned parts: an item store through them is one machine store, never half a number.
        self.heads = self._view[HEAD_AT : HEAD_AT + 8].cast("q")
        self._tails = self._view[TAIL_AT : TAIL_AT + 8].cast("q")
        header = HEADER.unpack_from(mapped)
        self.ring: int = header[2]
        self.since_ns: int = header[-1]
        self.offset: int = self.since_ns - began
        """From what `time.perf_counter_ns` reads to ns since 1970, so that times never run backwards."""
        self.words = self._view[self.ring :].cast("q")
        self.losses = self._view[self.ring :].cast("d")
        self.mask = capacity - 1
        self.head = 0
        self._taken = 0  # how many transitions of the frame at the tail were drained
        self._first_seq = first_seq
        self.limit = capacity - MOST_FRAMES
        self.newest: Line | None = None
        self._lines: dict[int, Line] = {}
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
        capacity: int = 16384,
    ) -> "Recorder":
        """Make the ring of a new attempt, in place of that of the attempt before, which is drained by now.

        `capacity` is in frames and a power of two, at least 64. The space is allocated at once.
        Raises RecorderError when it cannot be (a full disk, a folder that cannot be written).
        """
        path = Path(path)
        if capacity < 64 or capacity & (capacity - 1):
            raise RecorderError(f"recorder capacity: found {capacity}, expected a power of two, at least 64")
        began = _read()
        header, ring = _header(attempt, next_seq, list(scopes), list(phases), capacity, time.time_ns())
        fresh = path.with_name(path.name + ".new")
        try:
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                # A hole in the file would be filled when it is first stored to; with the disk full then,
                # the kernel answers with SIGBUS. So the space is taken here.
                os.posix_fallocate(file, 0, ring + capacity * SIZE)
                os.pwrite(file, header, 0)
                mapped = mmap.mmap(file, ring + capacity * SIZE)
            finally:
                os.close(file)
            os.rename(fresh, path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise RecorderError(
                f"{path}: cannot allocate a flight recorder of {capacity * SIZE >> 20} MiB ({error}); "
                "free some space, or choose a root that can be written"
            ) from error
        return cls(path, mapped, attempt=attempt, first_seq=next_seq, began=began, capacity=capacity)

    @property
    def next_seq(self) -> int:
        """The seq that the next transition will get."""
        return self._first_seq if self.newest is None else self.newest.seq + 1

    @property
    def fill(self) -> float:
        """How much of the ring waits to be drained: at 1 it is full."""
        waiting = self.heads[0] - self._tails[0]
        if waiting == 1 and self._taken:  # the newest frame stays until there is another
            return 0.0
        return float(waiting / (self.capacity - MOST_FRAMES))

    @property
    def closed(self) -> bool:
        """Is it unmapped?"""
        return self.map.closed

    def now(self) -> int:
        """Nanoseconds since 1970, by a clock that never runs backwards."""
        return _read() + self.offset

    def stamp(self, arc: int) -> int:
        """What makes a transition that is complete now of what `time.perf_counter_ns` reads, added to it."""
        return stamp(arc) + self.offset - self.since_ns

    def spent(self, scope: int, frames: int = 64) -> dict[int, int]:
        """Nanoseconds by arc, of a scope in the newest frames but one, which may be going on; from any thread."""
        found: dict[int, int] = {}
        try:
            words, head = self.words, self.heads[0]
            for position in range(max(0, head - frames, head - self.capacity + 1), head - 1):
                at = (position & self.mask) * WORDS
                if scope_of(words[at + TAGS]) != scope:
                    continue
                before = (words[at + STEPS] & NS) - duration(words[at + STEPS], words[at + BEGAN])
                for word in words[at + STEPS : at + LOSS]:
                    if not word:
                        break
                    arc, ns = arc_of(word), word & NS
                    found[arc] = found.get(arc, 0) + ns - before
                    before = ns
        except ValueError:  # it was closed meanwhile
            pass
        return found

    def line(self, scope: int) -> Line:
        """The transitions of one of the scopes."""
        found = self._lines.get(scope)
        if found is None:
            found = self._lines[scope] = Line(self, scope)
        return found

    def begin(
        self,
        tags: int,
        epoch: int,
        batch: int,
        step: int,
        loss: float,
        began: int,
        note: bytes,
    ) -> tuple[int, int]:
        """Begin a frame with its first transition, for a line to go on with; (its place in the ring, its seq)."""
        position = self.head
        if position >= self.limit:
            self._wait_for_room()
        seq = self.next_seq
        pieces = texts(seq, note) if note else ()
        slot = position & self.mask
        tags |= len(pieces) << 16
        _begin(self.map, self.ring + slot * SIZE, seq, epoch, batch, tags, step, loss, began)
        for at, piece in enumerate(pieces, position + 1):
            start = self.ring + (at & self.mask) * SIZE
            self.map[start : start + SIZE] = piece
        self.heads[0] = self.head = position + 1 + len(pieces)  # the commit
        return slot, seq

    def set_loss(self, seq: int, loss: float) -> None:
        """Fill in the loss of an earlier `forward`, if its frame has not been overwritten.

        Raises ValueError if `seq` is no `forward`, or was never recorded.
        """
        if not self._first_seq <= seq < self.next_seq:
            raise ValueError(f"set_loss: seq {seq} was not recorded in this attempt")
        words, mask, oldest = self.words, self.mask, max(0, self.head - self.capacity)
        low, high = oldest, self.head
        while low < high:
            middle = (low + high) // 2
            if words[(middle & mask) * WORDS] <= seq:
                low = middle + 1
            else:
                high = middle
        position = self._transitions_before(low)
        if position < oldest:
            return
        frame = (position & mask) * WORDS
        at = seq - words[frame]
        step = words[frame + STEPS + at] if 0 <= at < STEPS_IN_A_FRAME else 0
        if not step:
            return
        arc = arc_of(step)
        if arc not in FORWARDS:
            raise ValueError(f"set_loss: transition {seq} is a {ARCS[arc].trigger.value!r}, not a 'forward'")
        self.losses[frame + LOSS] = loss
        words[frame + TAGS] |= LATE

    def take(self, *, whole: int = 0) -> tuple[Chunk, tuple[int, int]]:
        """What has not been drained, and what to hand to `release` when it is durable elsewhere.

        The newest frame, which may have only some of its batch's transitions yet, is left out where there are at
        least `whole` others (0: never). One with a note is complete.
        """
        tail, head = self._tails[0], self.heads[0]
        if whole and head - tail > whole and not is_text(self.words[(head - 1 & self.mask) * WORDS + TAGS]):
            head -= 1
            return Chunk(self._copy(tail, head), self._taken, self.since_ns), (head, 0)
        data = self._copy(tail, head)
        last = data[-SIZE:]
        if not last or is_text(tags_of(last)):
            upto = (head, 0)  # a transition with a note ends its frame
        else:
            upto = (head - 1, sum(map(bool, arcs_of(last))))
        return Chunk(data, self._taken, self.since_ns), upto

    def release(self, upto: tuple[int, int]) -> None:
        """What `take` gave is durable elsewhere; its frames may be overwritten."""
        self._tails[0], self._taken = upto

    def close(self) -> None:
        """Unmap the file. What it holds stays readable; `record` raises RecorderError from now on."""
        if self.map.closed:
            return
        for line in self._lines.values():
            line.leave()
        self.limit = -1  # sends whoever records the long way round, where he is told
        for view in (self.heads, self._tails, self.words, self.losses, self._view):
            view.release()
        self.map.close()

    def forget(self) -> None:
        """In a forked child the ring is the parent's still: unmap it, so that nothing can write to it."""
        self.close()

    def catch_up(self) -> None:
        """Count what was committed, also where an exception struck before that was done."""
        position = self._transitions_before(self.heads[0])
        if position < 0:
            return
        words, frame = self.words, (position & self.mask) * WORDS
        line, first = self.line(scope_of(words[frame + TAGS])), frame + STEPS
        for other in self._lines.values():
            other.leave()
        self.head, self.newest = self.heads[0], line
        line._seq, line.first = words[frame], first
        line.at = line.end = first + sum(words[first + at] != 0 for at in range(STEPS_IN_A_FRAME))

    def _transitions_before(self, position: int) -> int:
        """The position of the last frame before `position` that holds transitions; -1 if there is none."""
        position -= 1
        while position >= 0 and is_text(self.words[(position & self.mask) * WORDS + TAGS]):
            position -= 1
        return position

    def _wait_for_room(self) -> None:
        # _limit is kept so low that one transition with the longest note fits whenever head < _limit.
        while True:
            if self.map.closed:
                raise RecorderError(
                    f"{self.path}: found this recorder closed (or made by the process that forked this one)"
                )
            self.limit = self._tails[0] + self.capacity - MOST_FRAMES
            if self.head < self.limit:
                return
            self.on_full()

    def _copy(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        first, last = start & self.mask, stop & self.mask
        ring = self.ring
        if first < last:
            return self.map[ring + first * SIZE : ring + last * SIZE]
        return (
            self.map[ring + first * SIZE : ring + self.capacity * SIZE] + self.map[ring : ring + last * SIZE]
        )


_begin = BEGIN.pack_into
_read = time.perf_counter_ns


def _wait_a_little() -> None:
    time.sleep(0.0005)


def _header(
    attempt: int, first_seq: int, scopes: list[str], phases: list[str], capacity: int, since_ns: int
) -> tuple[bytes, int]:
    # The arcs are written out: a later version may number them differently, and still has to drain this.
    arcs = [[arc.trigger.value, arc.source.value, arc.dest.value] for arc in ARCS]
    text = json.dumps({"scopes": scopes, "phases": phases, "arcs": arcs}).encode()
    ring = -(-(JSON_AT + len(text)) // mmap.PAGESIZE) * mmap.PAGESIZE
    header = bytearray(JSON_AT + len(text))
    HEADER.pack_into(
        header,
        0,
        MAGIC,
        VERSION,
        ring,
        attempt,
        capacity,
        first_seq,
        len(text),
        zlib.crc32(text),
        since_ns,
    )
    header[JSON_AT:] = text
    return bytes(header), ring
