"""The flight recorder, with real processes that are really killed."""

import math
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tracking
import walk
from states.table import ARCS, Trigger
from tracking.frames import MAX_NOTE_BYTES, NS, PENDING, SIZE, TO_LOSS, Record, is_pending, stamp
from tracking.recorder import FORWARDS, Recorder, RecorderError
from tracking.recorder_view import RecorderDamagedError, RecorderView, read_recorder
from walk import put

ROOT = Path(tracking.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FORWARD = next(i for i, arc in enumerate(ARCS) if arc.trigger is Trigger.FORWARD)
FETCH = next(i for i, arc in enumerate(ARCS) if arc.trigger is Trigger.FETCH)
NAN = math.nan


def make(path: Path, capacity: int = 256, next_seq: int = 1) -> Recorder:
    return Recorder.create(
        path / "recorder.bin",
        attempt=3,
        next_seq=next_seq,
        scopes=["train", "validation/val"],
        phases=["", "generator"],
        capacity=capacity,
    )


def record(recorder: Recorder, number: int, note: str = "") -> int:
    """A transition all of whose numbers follow from `number`."""
    return put(recorder, FORWARD, 0, 1, number, number * 2, number * 3, number * 5, number / 7, note)


def expected(of: Recorder | RecorderView, seq: int, number: int, note: str = "") -> Record:
    time_ns = of.since_ns + number * 3
    return Record(seq, FORWARD, 0, 1, number, number * 2, time_ns, number * 5, number / 7, note)


def repeat(times: int, act: Callable[[int], object]) -> None:
    for number in range(times):
        act(number)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    recorder = make(tmp_path, next_seq=41)
    assert recorder.next_seq == 41
    assert [record(recorder, number) for number in range(5)] == [41, 42, 43, 44, 45]
    view = read_recorder(recorder.path)
    assert (view.attempt, view.first_seq, view.next_seq, view.capacity) == (3, 41, 46, 256)
    assert (view.scopes, view.phases) == (("train", "validation/val"), ("", "generator"))
    assert view.arcs[FORWARD][0] == "forward"
    assert FORWARD in view.forwards
    assert FETCH not in view.forwards
    assert list(view.records) == [expected(view, 41 + number, number) for number in range(5)]
    assert view.damaged == 0


@pytest.mark.parametrize("least", [True, False])
def test_extreme_numbers_survive(least: bool, tmp_path: Path) -> None:
    recorder = make(tmp_path)
    place = (-1, -1) if least else (2**63 - 1, 2**63 - 1)
    numbers = (*place, 0 if least else NS, -(2**55) if least else 2**55 - 1)
    put(recorder, FORWARD, 1, 0, *numbers, -0.0)
    put(recorder, FORWARD, 1, 0, *numbers, math.inf)
    put(recorder, FETCH, 1, 0, *numbers, NAN)
    put(recorder, FORWARD, 1, 0, *numbers, PENDING)
    found = read_recorder(recorder.path).records
    assert [(*one[4:6], one.time_ns - recorder.since_ns, one.duration_ns) for one in found] == [numbers] * 4
    assert math.copysign(1, found[0].loss) == -1
    assert found[1].loss == math.inf
    assert [is_pending(record.loss) for record in found] == [False, False, False, True]


def test_what_does_not_fit_is_refused_and_commits_nothing(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    with pytest.raises(struct.error):
        put(recorder, FETCH, 0, 0, 0, "two", 0, 0, NAN)  # type: ignore[arg-type]
    for ns in (-1, NS + 1):
        with pytest.raises(
            ValueError, match=f"found {recorder.since_ns + ns} ns, expected {recorder.since_ns} and"
        ):
            put(recorder, FETCH, 0, 0, 0, 0, ns, 0, NAN)
    record(recorder, 1)
    assert read_recorder(recorder.path).records == (expected(recorder, 1, 1),)


@pytest.mark.parametrize("note", ["stop", "x" * 48, "x" * 49, "äöü€" * 40, "long " * 2000])
def test_notes(tmp_path: Path, note: str) -> None:
    recorder = make(tmp_path)
    record(recorder, 1)
    record(recorder, 2, note)
    record(recorder, 3)
    found = read_recorder(recorder.path).records
    cut = note.encode()[:MAX_NOTE_BYTES].decode(errors="ignore")
    assert list(found) == [expected(recorder, 1, 1), expected(recorder, 2, 2, cut), expected(recorder, 3, 3)]
    assert len(found[1].note.encode()) > MAX_NOTE_BYTES - 4 or found[1].note == note


def test_a_full_ring_waits_and_overwrites_nothing_undrained(tmp_path: Path) -> None:
    recorder = make(tmp_path, capacity=256)
    drained: list[int] = []
    waits = []

    def drain() -> None:
        waits.append(recorder.fill)
        chunk, position = recorder.take()
        drained.extend(found.seq for found in chunk.records)
        for found in chunk.records:
            assert found.note == ("a note" if found.seq % 7 == 0 else "")
        recorder.release(position)

    recorder.on_full = drain
    for number in range(5000):
        record(recorder, number, "a note" if recorder.next_seq % 7 == 0 else "")
    drain()
    assert drained == list(range(1, 5001))
    assert len(waits) > 20
    assert all(fill >= 1 for fill in waits[:-1])


def test_the_wait_for_room_can_be_ended(tmp_path: Path) -> None:
    recorder = make(tmp_path)

    def give_up() -> None:
        raise RuntimeError("nobody drains")

    recorder.on_full = give_up
    with pytest.raises(RuntimeError, match="nobody drains"):
        repeat(300, lambda number: record(recorder, number))
    recorded = recorder.next_seq - 1
    assert len(read_recorder(recorder.path).records) == recorded < 256


def test_drained_records_stay_readable_until_overwritten(tmp_path: Path) -> None:
    recorder = make(tmp_path, capacity=256)
    for number in range(1000):
        record(recorder, number)
        recorder.release(recorder.take()[1])
    seqs = [found.seq for found in read_recorder(recorder.path).records]
    assert seqs == list(range(seqs[0], 1001))
    assert 100 < len(seqs) <= 256


def test_late_losses(tmp_path: Path) -> None:
    recorder = make(tmp_path, capacity=256)
    seqs = []
    for number in range(40):
        put(recorder, FETCH, 0, 0, 0, number, 0, 0, NAN, "noted" if number % 3 == 0 else "")
        seqs.append(put(recorder, FORWARD, 0, 0, 0, number, 0, 0, PENDING))
    for seq in seqs[::2]:
        recorder.set_loss(seq, seq / 3)
    view = read_recorder(recorder.path)
    by_seq = {found.seq: found for found in view.records}
    assert view.late == set(seqs[::2])
    assert all(by_seq[seq].loss == seq / 3 for seq in seqs[::2])
    assert all(is_pending(by_seq[seq].loss) for seq in seqs[1::2])
    with pytest.raises(ValueError, match="'fetch', not a 'forward'"):
        recorder.set_loss(seqs[0] - 1, 1.0)
    with pytest.raises(ValueError, match="was not recorded"):
        recorder.set_loss(recorder.next_seq, 1.0)


def test_a_loss_too_late_for_its_slot_changes_no_other(tmp_path: Path) -> None:
    recorder = make(tmp_path, capacity=256)
    for number in range(1500):
        record(recorder, number, "n" if number % 2 else "")
        recorder.release(recorder.take()[1])
    before = read_recorder(recorder.path).records
    recorder.set_loss(1400, 4.0)
    for seq in (1, 700, 1000):
        recorder.set_loss(seq, 5.0)
    after = read_recorder(recorder.path).records
    assert [found for found in after if found not in before] == [
        found._replace(loss=4.0) for found in before if found.seq == 1400
    ]


CHILD = """
import mmap, os, struct, sys
from tracking.recorder import Recorder
from states.table import ARCS
folder, capacity = sys.argv[1], int(sys.argv[2])
file = os.open(folder + "/marks", os.O_RDWR)
marks = memoryview(mmap.mmap(file, 8)).cast("q")
recorder = Recorder.create(folder + "/recorder.bin", attempt=3, next_seq=1, scopes=["train"],
                           phases=["", "generator"], capacity=capacity)
arc = next(i for i, arc in enumerate(ARCS) if arc.trigger.value == "forward")
print("ready", flush=True)
number = 0
while True:
    note = "note " * (number % 50) if number % 11 == 0 else ""
    time_ns = recorder.since_ns + number * 3
    marks[0] = recorder.line(0).record(arc, 1, number, number * 2, time_ns, number * 5, number / 7, note)
    number += 1
"""


@pytest.mark.parametrize("kills", [15, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_process_loses_no_transition(kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments: every marked transition is there, whole, and no other but the next."""
    chance = random.Random(kills)
    counts = set()
    for round_ in range(kills):
        folder = tmp_path / str(round_)
        folder.mkdir()
        (folder / "marks").write_bytes(bytes(8))
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), "65536"], stdout=subprocess.PIPE, env=ENVIRONMENT
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            # Not after a random time: on a busy machine the child may not have had its turn yet.
            target = chance.randrange(30_000)
            while struct.unpack("<q", (folder / "marks").read_bytes())[0] < target:
                time.sleep(chance.uniform(0, 0.0005))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        marked = struct.unpack("<q", (folder / "marks").read_bytes())[0]
        view = read_recorder(folder / "recorder.bin")
        notes = [("note " * (number % 50) if number % 11 == 0 else "") for number in range(len(view.records))]
        assert [*view.records] == [
            expected(view, number + 1, number, note) for number, note in enumerate(notes)
        ]
        assert marked <= len(view.records) <= marked + 1
        assert view.damaged == 0
        counts.add(marked)
    assert len(counts) > 0.8 * kills


def test_a_reader_beside_a_fast_writer_sees_whole_records_only(tmp_path: Path) -> None:
    recorder = make(tmp_path, capacity=256)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            record(recorder, number, "a note" if number % 13 == 0 else "")
            if number % 50 == 0:
                recorder.release(recorder.take()[1])
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    # Another process reads: this one's threads take turns, and would never read in the midst of a store.
    script = (
        "import sys; from tracking.recorder_view import read_recorder\n"
        "newest = set()\n"
        "for _ in range(1500):\n"
        "    view = read_recorder(sys.argv[1])\n"
        "    seqs = [record.seq for record in view.records]\n"
        "    assert not seqs or seqs == list(range(seqs[0], seqs[-1] + 1)), seqs\n"
        "    for seq, arc, scope, phase, epoch, batch, t, d, loss, note in view.records:\n"
        "        n = seq - 1\n"
        "        assert (epoch, batch, t - view.since_ns, d, loss, note) == "
        "(n, 2 * n, 3 * n, 5 * n, n / 7, 'a note' if n % 13 == 0 else ''), seq\n"
        "    newest.add(view.next_seq)\n"
        "print(len(newest))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(recorder.path)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
    finally:
        stop.set()
        writer.join()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_file_cut_at_any_byte_is_an_error(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    for number in range(100):
        record(recorder, number)
    whole = recorder.path.read_bytes()
    cut = tmp_path / "cut.bin"
    for length in (*range(0, 5000, 97), *range(5000, len(whole), 1009), len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(RecorderDamagedError, match="not a whole flight recorder"):
            read_recorder(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=70)), max_size=5))
def test_garbage_never_crashes_a_reader(tmp_path: Path, patches: list[tuple[int, bytes]]) -> None:
    recorder = make(tmp_path)
    for number in range(90):
        record(recorder, number, "note" if number % 9 == 0 else "")
    raw = bytearray(recorder.path.read_bytes())
    recorder.close()
    for offset, patch in patches:
        raw[offset : offset + len(patch)] = patch
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(raw)
    try:
        view = read_recorder(damaged)
    except RecorderError:
        return
    seqs = [found.seq for found in view.records]
    assert seqs == sorted(set(seqs))
    for found in view.records:
        assert view.arcs[found.arc]
        assert view.scopes[found.scope]
        assert view.phases[found.phase] is not None


def test_lost_pages_leave_what_is_before_and_after(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    for number in range(150):
        record(recorder, number)
    raw = bytearray(recorder.path.read_bytes())
    ring = len(raw) - 256 * SIZE
    raw[ring + 50 * SIZE : ring + 100 * SIZE] = bytes(50 * SIZE)
    recorder.path.write_bytes(raw)
    view = read_recorder(recorder.path)
    assert [found.seq for found in view.records] == [*range(1, 51), *range(101, 151)]
    assert view.damaged == 50


def test_a_later_layout_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path).path
    raw = bytearray(path.read_bytes())
    raw[8] = 9
    path.write_bytes(raw)
    with pytest.raises(RecorderError, match="found recorder layout 9, expected 3"):
        read_recorder(path)


@pytest.mark.parametrize("capacity", [0, 100, 300, -256])
def test_a_capacity_that_cannot_be(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(RecorderError, match=f"found {capacity}, expected a power of two"):
        make(tmp_path, capacity)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_when_the_ring_is_made(tmp_path: Path) -> None:
    """And not a SIGBUS when it is first stored to."""
    make(tmp_path).close()
    before = (tmp_path / "recorder.bin").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RecorderError, match="cannot allocate a flight recorder of 8 MiB"):
            make(tmp_path, capacity=65536)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["recorder.bin"]
    assert (tmp_path / "recorder.bin").read_bytes() == before


def test_a_forked_child_cannot_write_to_its_parents_ring(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    record(recorder, 0)
    child = os.fork()
    if child == 0:
        try:
            record(recorder, 1)
        except RecorderError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    record(recorder, 2)
    assert [found.epoch for found in read_recorder(recorder.path).records] == [0, 2]


def test_closing_twice_and_reading_after(tmp_path: Path) -> None:
    recorder = make(tmp_path)
    record(recorder, 0)
    recorder.close()
    recorder.close()
    with pytest.raises(RecorderError, match="closed"):
        record(recorder, 1)
    assert len(read_recorder(recorder.path).records) == 1


def test_the_ring_is_aligned(tmp_path: Path) -> None:
    """One machine store for head, tail and loss needs them at multiples of 8; slots do not straddle pages."""
    many = [f"validation/{number}" for number in range(300)]
    recorder = Recorder.create(tmp_path / "r", attempt=1, next_seq=1, scopes=many, phases=[""], capacity=256)
    assert recorder.ring % mmap.PAGESIZE == 0
    put(recorder, FETCH, 299, 0, 0, 0, 0, 0, NAN)
    view = read_recorder(recorder.path)
    assert view.scopes[view.records[0].scope] == "validation/299"


BATCH = [
    code
    for code, arc in enumerate(ARCS)
    if arc.trigger in (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH)
]
CYCLE = [next(code for code in BATCH if ARCS[code].trigger is trigger) for trigger in walk.BATCH]
acts = st.lists(
    st.one_of(
        st.tuples(
            st.just("record"),
            st.sampled_from(BATCH),
            st.sampled_from([0, 0, 0, 1]),  # the scope
            st.sampled_from([1, 1, 1, 0]),  # the phase
            st.sampled_from([False, False, True]),  # another batch than the one before
            st.sampled_from([True, True, True, False]),  # begun when the one before was complete
            st.sampled_from(["", "", "", "", "why " * 50]),
        ),
        st.sampled_from([("take", 0), ("take", 2), ("restart",), ("late",)]),
    ),
    max_size=120,
)


@given(acts)
def test_whatever_is_recorded_is_read_and_taken_whole(acts: list[tuple[Any, ...]]) -> None:
    """By lines, in frames that are continued or not, taken in pieces or not: it is what was recorded, each once."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = make(Path(folder), capacity=256)
        expected: list[Record] = []
        taken: list[Record] = []
        late: set[int] = set()
        batch, time_ns = 0, recorder.since_ns

        def take(whole: int = 0) -> None:
            chunk, upto = recorder.take(whole=whole)
            if not whole:
                assert bool(chunk) == (len(taken) < len(expected))
            elif left := expected[len(taken) + len(chunk.records) :]:
                # Of the newest frame, which is of one batch, and in which nothing has a note.
                assert len({(one.scope, one.phase, one.batch, one.note) for one in left}) == 1
                assert not left[0].note
                assert len(chunk.data) >= whole * SIZE
            if chunk:
                assert chunk.first == len(taken) + 1
            taken.extend(chunk.records)
            recorder.release(upto)

        for act, *what in acts:
            if act == "take":
                take(*what)
            elif act == "restart":
                recorder.line(0).restart()
            elif act == "late":
                pending = [found for found in expected if is_pending(found.loss)]
                if pending:
                    seq = pending[-1].seq
                    recorder.set_loss(seq, 2.5)
                    late.add(seq)
                    expected[seq - 1] = expected[seq - 1]._replace(loss=2.5)
                    if len(taken) >= seq:
                        taken[seq - 1] = taken[seq - 1]._replace(loss=2.5)
            else:
                arc, scope, phase, another, at_once, note = what
                batch += another
                took = 7 if at_once else 3
                time_ns += 7
                loss = PENDING if arc in FORWARDS else NAN
                seq = recorder.line(scope).record(arc, phase, 5, batch, time_ns, took, loss, note)
                expected.append(Record(seq, arc, scope, phase, 5, batch, time_ns, took, loss, note))
        view = read_recorder(recorder.path)
        assert [*map(same, view.records)] == [*map(same, expected)]
        assert view.late == late
        assert view.damaged == 0
        take()
        assert [*map(same, taken)] == [*map(same, expected)]
        recorder.close()


def same(found: Record) -> tuple[Any, ...]:
    """A record as something that is equal where it is the same, NaN included."""
    return (*found[:8], struct.pack("<d", found.loss), found.note)


def test_a_batch_is_one_frame_and_what_is_written_in_a_hurry_is_the_same(tmp_path: Path) -> None:
    recorder = make(tmp_path, 512)
    line = recorder.line(0)
    line.lap(CYCLE[0], 0, 0, 0)
    place = SimpleNamespace(epoch=0, batch=0)
    laps = []
    begin = line.beginner(
        CYCLE[0],
        0,
        place,
        lambda: laps.append(line.lap(CYCLE[0], 0, 0, place.batch, note="n" * (batch % 7 == 0))),
    )
    for batch in range(1, 1000):
        place.batch = batch
        if noted := batch % 7 == 0 or batch % 11 == 0:  # something was noted, or no longer is
            line.end_frame()
        begin()
        assert laps or not noted
        laps.clear()
        if batch % 7 == 0:
            assert line.at >= line.end  # a transition with a note ends its frame
            line.lap(CYCLE[1], 0, 0, batch, batch / 7)
            for arc in CYCLE[2:5]:
                line.lap(arc, 0, 0, batch)
            continue
        for at, arc in enumerate(CYCLE[1:5]):
            if arc in FORWARDS:
                assert line.free
                recorder.losses[line.first + TO_LOSS], line.free = batch / 7, False
            assert line.at == line.first + 1 + at < line.end
            recorder.words[line.at] = time.perf_counter_ns() + recorder.stamp(arc)
            line.at += 1
        if batch % 50 == 0:
            recorder.release(recorder.take()[1])
    assert (line.seq, line.arc) == (recorder.next_seq - 1, CYCLE[4]) == (1 + 999 * 5, CYCLE[4])
    view = read_recorder(recorder.path)
    assert len(view.records) > 1000
    for before, found in pairwise(view.records):
        assert found.seq == before.seq + 1
        assert found.time_ns - found.duration_ns == before.time_ns
        assert found.batch == (found.seq + 3) // 5
        assert found.arc == CYCLE[(found.seq - 2) % 5]
        assert math.isnan(found.loss) if found.arc not in FORWARDS else found.loss == found.batch / 7


@pytest.mark.parametrize("committed", [True, False])
def test_what_an_exception_kept_from_being_counted_is_counted_by_catch_up(
    committed: bool, tmp_path: Path
) -> None:
    """Signals strike between any two steps of Python: before the commit it has not happened, after it it has."""
    recorder = make(tmp_path)
    line = recorder.line(0)
    line.lap(CYCLE[0], 0, 0, 0)
    if committed:
        recorder.words[line.at] = time.perf_counter_ns() + recorder.stamp(CYCLE[1])
    recorder.catch_up()
    assert (line.seq, line.arc) == ((2, CYCLE[1]) if committed else (1, CYCLE[0]))
    assert line.lap(CYCLE[2], 0, 0, 0) > 0
    assert (
        recorder.begin(1, 0, 0, stamp(CYCLE[0]) + 5, NAN, 4, b"noted" if committed else b"")[1]
        == line.seq + 1
    )
    recorder.catch_up()
    assert recorder.line(1).seq == recorder.next_seq - 1 == line.seq + 1
    line.lap(CYCLE[3], 0, 0, 0)
    seqs = [found.seq for found in read_recorder(recorder.path).records]
    assert seqs == list(range(1, recorder.next_seq))
