"""What is made of a run whose process died: with processes that are really killed."""

import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tracking
from states.table import TERMINAL, State, Trigger
from tracking.frames import SIZE
from tracking.journal import DIED, Journal, Settled, Transition, settle
from tracking.recorder_view import read_recorder
from tracking.runs import Lease, RunFolder
from walk import Walk, begin

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(tracking.__file__).parent.parent), str(Path(__file__).parent)]),
}


def rows(run: RunFolder) -> list[Transition]:
    with Journal.open(run) as journal:
        return list(journal.transitions(include_superseded=True))


def assert_words(found: list[Transition]) -> None:
    """Each scope's moves of each attempt follow on each other, and end."""
    stands: dict[tuple[int, str], State] = {}
    assert [row.seq for row in found] == list(range(1, len(found) + 1))
    for row in found:
        first = State.HALTED if row.trigger is Trigger.RESUME else State.IDLE
        here = stands.get((row.attempt, row.scope), first)
        if row.scope != "train" and here in TERMINAL:
            here = State.IDLE  # the next pass
        assert row.source is here
        stands[row.attempt, row.scope] = row.dest
    assert all(state in TERMINAL for state in stands.values())


def die(run: RunFolder, body: str, position: int | None = None) -> None:
    """A trainer that holds the lease, does `body`, and is killed."""
    script = f"""
import math, os, pathlib, signal
from tracking.journal import *; from tracking.frames import PENDING; from tracking.runs import *
from walk import *
run = RunFolder(pathlib.Path({str(run.path)!r}))
lease = Lease.acquire(run)
recorder, writer = begin(run, lease, {position})
walk = Walk(recorder, State.IDLE if {position} is None else State.HALTED)
{body}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def halt_of(found: Transition) -> tuple[object, ...]:
    return (found.scope, found.trigger, found.source, found.dest, found.note)


TRAINER = """
import mmap, os, pathlib, random, sys
from tracking.journal import *; from tracking.runs import *; from walk import *
run = RunFolder(pathlib.Path(sys.argv[1]))
chance = random.Random(int(sys.argv[2]))
marks = memoryview(mmap.mmap(os.open(sys.argv[3], os.O_RDWR), 8)).cast("q")
settle(run)
with Journal.open(run) as journal:
    last = journal.last_transition()
    kept = [row.seq for row in journal.transitions(scope="train") if row.trigger.value == "end_batch"]
with Lease.acquire(run) as lease:
    position = None if last is None else chance.choice(kept) if kept else 0
    recorder, writer = begin(run, lease, position, capacity=1024)
    walk = Walk(recorder, State.IDLE if last is None else State.HALTED)
    def mark(seq):
        marks[0] = seq
    walk.after = mark
    if last is not None:
        walk.go(Trigger.RESUME, State.BATCH_END if kept else State.IDLE)
        if kept:
            walk.go(Trigger.END_EPOCH)
    print("ready", flush=True)
    while True:
        walk.epochs(batches=chance.randrange(20))
        validation = Walk(recorder, scope=1)
        validation.after = mark
        validation.go(Trigger.BEGIN_EPOCH)
        for trigger in (Trigger.FETCH, Trigger.FORWARD, Trigger.END_BATCH):
            validation.go(trigger, loss=0.5 if trigger is Trigger.FORWARD else math.nan)
        validation.go(Trigger.END_EPOCH); validation.go(Trigger.FINISH)
        time.sleep(0.003)  # or the journal gets too long to read in a test
        if chance.random() < 0.1:
            writer.sync()
""".replace("import mmap", "import math, mmap, time")


@pytest.mark.parametrize("attempts", [4, pytest.param(12, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_misses_nothing(attempts: int, run: RunFolder, tmp_path: Path) -> None:
    """SIGKILL while recording and draining; each next attempt goes back to somewhere in what is kept."""
    chance = random.Random(11)
    marks = tmp_path / "marks"
    for attempt in range(1, attempts + 1):
        marks.write_bytes(bytes(8))
        with subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(run.path), str(attempt), str(marks)],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            assert settle(run) is None  # it is alive
            time.sleep(chance.uniform(0, 0.25))
            child.kill()
        marked = struct.unpack("<q", marks.read_bytes())[0]
        with Journal.open(run) as journal:
            live = [row.seq for row in journal.transitions(live=True, include_superseded=True)]
        assert live[-1] in (marked, marked + 1)
        if attempt % 3 == 0:
            continue  # the next attempt settles it
        settled = settle(run)
        assert settled is not None
        assert (settled.attempt, settled.notes) == (attempt, ())
        found = rows(run)
        assert [row.seq for row in found[: len(live)]] == live
        assert all(row.note == DIED for row in found[len(live) :])
        assert len(found) - len(live) in (1, 2)
        assert found[-1].source is settled.state
        assert_words(found)
        assert settle(run) is None
        assert rows(run) == found
    settle(run)
    with Journal.open(run) as journal:
        assert [row.outcome for row in journal.attempts()] == ["died"] * attempts
        assert {row.end_state for row in journal.attempts()} == {State.HALTED}


def test_nothing_to_settle(run: RunFolder) -> None:
    assert settle(run) is None
    with Lease.acquire(run) as lease:
        assert settle(run, lease) is None
        recorder, writer = begin(run, lease)
        Walk(recorder).epochs().go(Trigger.FINISH)
        writer.end("done")
        writer.close()
        assert settle(run, lease) is None
    assert settle(run) is None
    assert rows(run)[-1].dest is State.DONE


def test_a_run_that_lives_is_left_alone(run: RunFolder) -> None:
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            Walk(recorder).epochs()
            assert settle(run) is None
            writer.end("stopped")


def test_a_process_killed_in_mid_batch(run: RunFolder) -> None:
    die(run, "walk.epochs(); walk.go(Trigger.BEGIN_EPOCH); walk.go(Trigger.FETCH); walk.go(Trigger.FORWARD)")
    drained = len(read_recorder(run.recorder).records)
    settled = settle(run)
    assert settled == Settled(attempt=1, drained=drained, state=State.FORWARD, notes=())
    found = rows(run)
    assert halt_of(found[-1]) == ("train", Trigger.HALT, State.FORWARD, State.HALTED, DIED)
    assert (found[-1].epoch, found[-1].batch) == (found[-2].epoch, found[-2].batch) == (1, 0)
    assert found[-1].time_ns == found[-2].time_ns  # nobody knows when it died: not before this
    with Journal.open(run) as journal:
        (attempt,) = journal.attempts()
    assert (attempt.outcome, attempt.reason, attempt.end_state) == ("died", DIED, State.HALTED)
    assert attempt.ended_ns == found[-1].time_ns


def test_a_process_that_died_before_its_first_transition(run: RunFolder) -> None:
    die(run, "")
    assert settle(run) == Settled(1, 0, State.IDLE, ())
    assert [halt_of(row) for row in rows(run)] == [("train", Trigger.HALT, State.IDLE, State.HALTED, DIED)]
    assert (rows(run)[0].epoch, rows(run)[0].batch) == (-1, -1)
    die(run, "", position=0)
    assert settle(run) == Settled(2, 0, State.HALTED, ())
    assert len(rows(run)) == 1  # it stood in HALTED already
    with Journal.open(run) as journal:
        assert [row.outcome for row in journal.attempts()] == ["died", "died"]
        assert [row.end_state for row in journal.attempts()] == [State.HALTED, State.HALTED]
    assert settle(run) is None


@pytest.mark.parametrize("last", ["walk.go(Trigger.FINISH)", "walk.go(Trigger.HALT, note='SIGTERM')"])
def test_a_process_killed_after_its_last_transition(run: RunFolder, last: str) -> None:
    die(run, "walk.epochs(); " + last)
    before = read_recorder(run.recorder).records
    settled = settle(run)
    found = rows(run)
    assert settled is not None
    assert settled.state is found[-1].dest
    assert len(found) == len(before)
    with Journal.open(run) as journal:
        assert journal.attempts()[0].outcome == "died"
        assert journal.attempts()[0].end_state is found[-1].dest


def test_a_validation_pass_that_was_cut_off_is_halted_too(run: RunFolder) -> None:
    die(
        run,
        "walk.go(Trigger.BEGIN_EPOCH)\n"
        "validation = Walk(recorder, scope=1).epochs(batches=0); validation.go(Trigger.FINISH)\n"
        "validation = Walk(recorder, scope=1)\n"
        "[validation.go(t) for t in (Trigger.BEGIN_EPOCH, Trigger.FETCH, Trigger.FORWARD)]",
    )
    settle(run)
    assert [halt_of(row) for row in rows(run)[-2:]] == [
        ("validation/val", Trigger.HALT, State.FORWARD, State.HALTED, DIED),
        ("train", Trigger.HALT, State.EPOCH_START, State.HALTED, DIED),
    ]


def test_partly_drained(run: RunFolder) -> None:
    die(
        run,
        "walk.epochs(); writer.sync(); walk.go(Trigger.BEGIN_EPOCH)\n"
        "for _ in range(3): walk.go(Trigger.FETCH); walk.go(Trigger.END_BATCH)",
    )
    settle(run)
    found = rows(run)
    assert len(found) == 17 + 7 + 1
    assert_words(found)


def test_losses_that_came_late_and_were_not_written_yet(run: RunFolder) -> None:
    die(
        run,
        "walk.go(Trigger.BEGIN_EPOCH)\n"
        "for t in (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH) * 2:\n"
        "    walk.go(t, loss=PENDING if t is Trigger.FORWARD else math.nan)\n"
        "writer.sync(); recorder.set_loss(3, 0.25)",
    )
    settle(run)
    assert [row.loss for row in rows(run) if row.dest is State.FORWARD] == [0.25, None]


def test_without_a_recorder_and_with_one_that_is_damaged(run: RunFolder) -> None:
    die(run, "walk.epochs(); writer.sync(); walk.go(Trigger.BEGIN_EPOCH)")
    whole = run.recorder.read_bytes()
    run.recorder.write_bytes(whole[:50_000])
    settled = settle(run)
    assert settled is not None
    assert settled.drained == 0
    assert "not a whole flight recorder" in settled.notes[0]
    assert halt_of(rows(run)[-1])[2] is State.EPOCH_END
    die(run, "walk.go(Trigger.RESUME, State.BATCH_END); writer.sync()", position=16)
    run.recorder.unlink()
    settled = settle(run)
    assert settled is not None
    assert settled.notes == ()
    assert_words(rows(run))


def test_transitions_after_a_gap_are_left_out(run: RunFolder) -> None:
    """As after a power cut, when the kernel wrote some pages of the ring and others not."""
    die(run, "walk.epochs(batches=30)")
    raw = bytearray(run.recorder.read_bytes())
    ring = len(raw) - 16384 * SIZE
    raw[ring + 20 * SIZE : ring + 22 * SIZE] = bytes(2 * SIZE)  # batches 19 and 20
    run.recorder.write_bytes(raw)
    settled = settle(run)
    assert settled is not None
    found = rows(run)
    assert [row.seq for row in found] == list(range(1, 98))
    assert "2 frames made no sense, and 46 transitions after a gap were left out" in settled.notes[0]
    assert_words(found)


def test_the_recorder_of_the_attempt_before_is_ignored(run: RunFolder) -> None:
    """A process may die between its attempt's row and its recorder, on either side."""
    die(run, "walk.epochs()")
    settle(run)
    before, old = rows(run), run.recorder.read_bytes()
    die(run, "", position=16)
    run.recorder.write_bytes(old)
    settled = settle(run)
    assert settled == Settled(2, 0, State.HALTED, ())
    assert [row.seq for row in rows(run)] == [row.seq for row in before]
    with Journal.open(run) as journal:
        assert len(list(journal.transitions(live=True))) == 16


def test_a_phase_and_scopes_are_those_of_the_recorder(run: RunFolder) -> None:
    """Whoever settles knows nothing of the run but its files, nor how its process numbered the table."""
    die(
        run,
        "walk.go(Trigger.BEGIN_EPOCH); walk.go(Trigger.FETCH)\n"
        "walk.go(Trigger.FORWARD, loss=math.nan, phase=1)\n"
        "walk.go(Trigger.BACKWARD, phase=1, note='ä' * 300)",
    )
    settle(run)
    found = rows(run)
    assert [(row.phase, row.trigger.value) for row in found[2:4]] == [
        ("generator", "forward"),
        ("generator", "backward"),
    ]
    assert found[2].loss is not None
    assert math.isnan(found[2].loss)
    assert found[3].note == "ä" * 300


def test_settling_that_is_killed_is_repeated(run: RunFolder) -> None:
    die(run, "walk.epochs(batches=400)")
    script = "import sys, pathlib; from tracking.journal import *; from tracking.runs import *\n" + (
        "print('ready', flush=True); settle(RunFolder(pathlib.Path(sys.argv[1])))\n"
    )
    chance = random.Random(5)
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, env=ENVIRONMENT
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))
            child.kill()
        assert len(rows(run)) in (0, 2003)
    settle(run)
    assert len(rows(run)) == 2003
    assert_words(rows(run))
