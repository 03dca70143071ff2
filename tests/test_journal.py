"""The journal's writer, views and reader, on real SQLite files and with real processes."""

import json
import math
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tracking
from states.table import ARCS, State, Trigger
from tracking import schema
from tracking.frames import NS, PENDING
from tracking.journal import (
    CheckpointRow,
    Journal,
    JournalDamagedError,
    JournalError,
    JournalFormatError,
    JournalStalledError,
    JournalWriter,
    Loss,
    open_attempt,
    settle,
)
from tracking.recorder import Recorder, RecorderError
from tracking.runs import Lease, RunFolder, create_run
from walk import BATCH, PHASES, SCOPES, Walk, begin, put, start

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(tracking.__file__).parent.parent), str(Path(__file__).parent)]),
}
NAN = math.nan


@pytest.fixture
def lease(run: RunFolder) -> Iterator[Lease]:
    with Lease.acquire(run) as lease:
        yield lease


@pytest.fixture
def writing(run: RunFolder, lease: Lease) -> Iterator[tuple[Recorder, JournalWriter]]:
    recorder, writer = begin(run, lease)
    with writer:
        yield recorder, writer


Writing = tuple[Recorder, JournalWriter]


def query(run: RunFolder, sql: str) -> list[tuple[object, ...]]:
    """What a tool that knows SQLite, and nothing of us, would read."""
    connection = sqlite3.connect(run.journal)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def repeat(times: int, act: Callable[[int], object]) -> None:
    for number in range(times):
        act(number)


def python(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- transitions


def test_what_is_recorded_is_journaled(run: RunFolder, writing: Writing) -> None:
    recorder, writer = writing
    walk = Walk(recorder).epochs(epochs=3, batches=4)
    walk.go(Trigger.FINISH, note="all epochs done")
    writer.sync()
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded
        assert journal.newest_seq() == len(walk.recorded) == recorder.next_seq - 1
        assert journal.last_transition() == walk.recorded[-1]
        assert list(journal.transitions(after=30)) == walk.recorded[30:]
        assert list(journal.transitions(epoch=1)) == [row for row in walk.recorded if row.epoch == 1]
        assert [row.dest for row in journal.transitions(state=State.STEP)] == [State.STEP] * 12
        assert list(journal.transitions(scope="validation/val")) == []
    columns = [
        *("seq", "attempt", "scope", "epoch", "batch", "phase", "trigger", "source", "dest"),
        *("time_ns", "duration_ns", "loss", "note"),
    ]
    connection = sqlite3.connect(run.journal)
    cursor = connection.execute("SELECT * FROM transitions ORDER BY seq LIMIT 3")
    assert [column[0] for column in cursor.description] == columns
    assert [row[:9] for row in cursor] == [
        (1, 1, "train", 0, -1, "", "begin_epoch", "IDLE", "EPOCH_START"),
        (2, 1, "train", 0, 0, "", "fetch", "EPOCH_START", "BATCH_START"),
        (3, 1, "train", 0, 0, "", "forward", "BATCH_START", "FORWARD"),
    ]
    connection.close()


step = st.tuples(
    st.sampled_from(range(len(ARCS))),
    st.sampled_from([0, 0, 0, 1]),  # scope
    st.sampled_from([0, 0, 1]),  # phase
    st.sampled_from([-1, 0, 0, 1, 2**40]),  # epoch
    st.sampled_from([-1, 0, 0, 0, 7]),  # batch
    st.integers(0, NS),  # time
    st.integers(-5, 2**40),  # duration
    st.one_of(st.just(NAN), st.floats(), st.just(-0.0)),
    st.sampled_from(["", "", "", "", "x", "ä note " * 30]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(step, st.booleans()), max_size=60))
def test_any_sequence_is_unpacked_as_it_was(tmp_path: Path, steps: list[tuple[tuple, bool]]) -> None:
    """Whatever is recorded, and wherever the drains fall, the rows come back bit for bit."""
    run = create_run(tmp_path, "any")
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease, capacity=256)
        with writer:
            for numbers, drain in steps:
                put(recorder, *numbers)
                if drain:
                    writer.sync()
            writer.sync()
            with Journal.open(run) as journal:
                rows = list(journal.transitions())
    assert [row.seq for row in rows] == list(range(1, len(steps) + 1))
    for row, ((arc, scope, phase, epoch, batch, ns, duration_ns, loss, note), _) in zip(
        rows, steps, strict=True
    ):
        move = ARCS[arc]
        assert (row.trigger, row.source, row.dest) == (move.trigger, move.source, move.dest)
        assert (row.scope, row.phase, row.epoch, row.batch) == (SCOPES[scope], PHASES[phase], epoch, batch)
        assert (row.time_ns - recorder.since_ns, row.duration_ns, row.note) == (ns, duration_ns, note)
        assert repr(row.loss) == repr(loss if move.trigger is Trigger.FORWARD else None)
    shutil.rmtree(run.path)


def test_a_transition_takes_few_bytes(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease)
    with writer:
        Walk(recorder).epochs(epochs=2, batches=1000)
        writer.end("done")
    assert run.journal.stat().st_size / 10_004 < 30  # 60 is promised


def test_pandas_and_the_sqlite_shell_read_the_views(run: RunFolder, writing: Writing) -> None:
    pandas = pytest.importorskip("pandas")
    recorder, writer = writing
    walk = Walk(recorder).epochs()
    writer.metrics("train", 0, 1, 1, {"loss": NAN, "accuracy": 0.5}, 77)
    writer.sync()
    connection = sqlite3.connect(run.journal)
    frame = pandas.read_sql("SELECT * FROM transitions", connection)
    assert list(frame.seq) == [row.seq for row in walk.recorded]
    assert list(frame.loss.dropna()) == [row.loss for row in walk.recorded if row.loss is not None]
    values = pandas.read_sql("SELECT * FROM metrics", connection).value.astype(float)
    assert math.isnan(values[0])
    assert values[1] == 0.5
    connection.close()
    shell = shutil.which("sqlite3")
    if shell:
        command = [shell, str(run.journal), "SELECT trigger, dest FROM transitions WHERE batch = 1"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed.split() == [
            *("fetch|BATCH_START", "forward|FORWARD", "backward|BACKWARD", "step|STEP", "end_batch|BATCH_END")
        ]


def test_long_journals_are_read_page_by_page(run: RunFolder, writing: Writing) -> None:
    recorder, writer = writing
    walk = Walk(recorder).epochs(batches=1700)
    writer.metrics("train", 0, -1, 0, {f"key{number}": number / 3 for number in range(9000)}, 5)
    writer.sync()
    with Journal.open(run) as journal:
        assert [row.seq for row in journal.transitions()] == [row.seq for row in walk.recorded]
        values = list(journal.metrics())
        assert [value.key for value in values] == [f"key{number}" for number in range(9000)]
        assert [value.value for value in values] == [number / 3 for number in range(9000)]
        assert [value.id for value in journal.metrics(limit=5000)] == [value.id for value in values[:5000]]


def test_losses_that_arrive_late(run: RunFolder, writing: Writing) -> None:
    """In time for the drain, and after it; a NaN that arrived differs from a loss that has not."""
    recorder, writer = writing
    walk = Walk(recorder)
    walk.go(Trigger.BEGIN_EPOCH)
    seqs = []
    for _ in range(8):
        for trigger in BATCH:
            seq = walk.go(trigger, loss=PENDING if trigger is Trigger.FORWARD else NAN)
            if trigger is Trigger.FORWARD:
                seqs.append(seq)
    writer.late_loss(seqs[0], 0.5)
    writer.sync()
    writer.late_loss(seqs[1], 1.5)
    writer.late_loss(seqs[2], NAN)
    writer.late_loss(seqs[3], -math.inf)
    with Journal.open(run) as journal:
        assert [row.loss for row in journal.transitions(state=State.FORWARD)][4:] == [None] * 4
        writer.sync()
        losses = [row.loss for row in journal.transitions(state=State.FORWARD)]
    assert repr(losses) == repr([0.5, 1.5, NAN, -math.inf, None, None, None, None])
    with pytest.raises(ValueError, match="not a 'forward'"):
        writer.late_loss(seqs[0] + 1, 1.0)


@pytest.fixture
def _threads_alternate_quickly() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("_threads_alternate_quickly")
def test_losses_and_metrics_that_arrive_while_the_journal_is_written(run: RunFolder, lease: Lease) -> None:
    """Thousands a second, from another thread than the one that writes them down."""
    recorder, writer, told = writer_with_warnings(run, lease)
    with writer:
        walk = Walk(recorder)
        walk.go(Trigger.BEGIN_EPOCH)
        walk.go(Trigger.FETCH)
        forward = walk.go(Trigger.FORWARD, loss=PENDING)

        def arrive() -> None:
            for number in range(6_000):
                writer.late_loss(forward, number)
                writer.metrics("train", 0, 0, number, {"n": number}, number)

        thread = threading.Thread(target=arrive)
        thread.start()
        while thread.is_alive():
            writer.sync()
        thread.join()
    assert told == []
    with Journal.open(run) as journal:
        steps = [row.step for row in journal.metrics()]
        (last,) = {row.loss for row in journal.transitions(state=State.FORWARD)}
    assert steps == list(range(6_000))
    assert last == 5_999


@pytest.mark.parametrize("batches", [1, 40, 700])
def test_the_newest_of_a_scope_is_found_behind_any_number_of_another(
    run: RunFolder, writing: Writing, batches: int
) -> None:
    recorder, _writer = writing
    walk = Walk(recorder).epochs(batches=3)
    validation = Walk(recorder, scope=1)
    with Journal.open(run) as journal:
        for _ in range(2):
            validation.state = State.IDLE
            validation.epochs(batches=batches)
            assert journal.last_transition() == walk.recorded[-1]
            assert journal.last_transition(SCOPES[1]) == validation.recorded[-1]
            assert journal.last_transition("validation/other") is None
            walk.epochs(batches=1)
            assert journal.last_transition(SCOPES[1]) == validation.recorded[-1]


def test_what_is_not_drained_yet_is_read_live(run: RunFolder, writing: Writing) -> None:
    recorder, _writer = writing
    walk = Walk(recorder)
    with Journal.open(run) as journal:
        for _ in range(30):
            walk.epochs(batches=20)
            assert list(journal.transitions(live=True)) == walk.recorded
            assert journal.last_transition() == walk.recorded[-1]
            chosen = list(journal.transitions(live=True, epoch=walk.epoch, state=State.STEP))
            assert len(chosen) == 20
        walk.go(Trigger.BEGIN_EPOCH)
        walk.go(Trigger.FETCH)
        walk.go(Trigger.FORWARD, loss=NAN)
        walk.go(Trigger.BACKWARD, note="noted")
        found = list(journal.transitions(live=True))[-2:]
        assert repr(found) == repr(walk.recorded[-2:])


def test_another_process_reads_along(run: RunFolder, writing: Writing) -> None:
    recorder, writer = writing
    script = (
        "import sys, pathlib\n"
        "from tracking.journal import *; from tracking.runs import *\n"
        "run, seqs = RunFolder(pathlib.Path(sys.argv[1])), []\n"
        "with Journal.open(run) as journal:\n"
        "    while not seqs or seqs[-1] < 40002:\n"
        "        seqs += [row.seq for row in journal.transitions(after=seqs[-1] if seqs else 0, live=True)]\n"
        "print(seqs == list(range(1, len(seqs) + 1)))\n"
    )
    answer: list[str] = []
    reader = threading.Thread(target=lambda: answer.append(python(script, run.path)))
    reader.start()
    walk = Walk(recorder)
    for _ in range(20):
        walk.epochs(batches=401)
        writer.sync()
        time.sleep(0.02)
    reader.join(60)
    assert answer == ["True\n"]


# --- metrics and the rest


def test_metrics_come_back_bit_for_bit(run: RunFolder, writing: Writing) -> None:
    _recorder, writer = writing
    values = {"nan": NAN, "inf": math.inf, "ninf": -math.inf, "zero": -0.0, "one": 1.0, "tiny": 5e-324}
    values |= {f"more{number}": number / 3 for number in range(15)}
    writer.metrics("train", 0, 0, 0, values, 11)
    writer.metrics("train", 0, -1, 1, {}, 12)
    writer.metrics("train", 0, -1, 1, {"loss": 2}, 13)
    writer.sync()
    with Journal.open(run) as journal:
        rows = list(journal.metrics())
        assert {row.key: repr(row.value) for row in rows[:-1]} == {k: repr(v) for k, v in values.items()}
        last = rows[-1]
        assert (last.attempt, last.scope, last.epoch, last.batch, last.step) == (1, "train", 0, -1, 1)
        assert (last.key, last.value, last.time_ns) == ("loss", 2.0, 13)
        assert list(journal.metrics(key="zero")) == [row for row in rows if row.key == "zero"]
    nulls = query(run, "SELECT count(*) FROM metrics WHERE value IS NULL")
    assert nulls == [(0,)]


def test_a_cursor_over_metrics_misses_none_and_repeats_none(run: RunFolder, writing: Writing) -> None:
    _, writer = writing
    chance, read, cursor, written = random.Random(3), [], 0, 0
    with Journal.open(run) as journal:
        for _ in range(40):
            for _ in range(chance.randrange(4)):
                keys = chance.randrange(1, 20)
                writer.metrics("train", 0, 0, written, {f"k{n}": written + n for n in range(keys)}, 0)
                written += keys
            if chance.random() < 0.5:
                writer.sync()
            found = list(journal.metrics(after=cursor, limit=chance.choice([None, 1, 3, 11])))
            cursor = found[-1].id if found else cursor
            read += found
        writer.sync()
        read += journal.metrics(after=cursor)
    assert [row.value for row in read] == list(range(written))
    assert [row.id for row in read] == sorted({row.id for row in read})


def test_checkpoints_logs_and_the_attempt(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease)
    with writer:
        walk = Walk(recorder).epochs()
        values = {"val/loss": NAN, "x": 1.5}
        writer.checkpoint(CheckpointRow("000017-a1", 17, 0, 2, State.BATCH_END, 1000, 5, 6, True, values))
        writer.checkpoint(CheckpointRow("000018-a1", 18, 0, 2, State.EPOCH_END, 1001, 7))
        writer.log("WARNING", "an empty batch", 8)
        writer.sync()
        writer.checkpoint_removed("000017-a1", 9)
        walk.go(Trigger.FINISH)
        writer.end("done", "all epochs done", time_ns=10)
    with Journal.open(run) as journal:
        assert [row.name for row in journal.checkpoints()] == ["000018-a1"]
        removed, kept = journal.checkpoints(include_removed=True)
        assert (removed.attempt, removed.seq, removed.state, removed.best) == (1, 17, State.BATCH_END, True)
        assert repr(removed.metrics) == repr({"val/loss": NAN, "x": 1.5})
        assert (removed.removed_ns, kept.removed_ns, kept.best, kept.duration_ns) == (9, None, False, 0)
        assert [(row.level, row.message, row.time_ns) for row in journal.logs()] == [
            ("WARNING", "an empty batch", 8)
        ]
        assert journal.logs(after=journal.logs()[-1].id) == []
        (attempt,) = journal.attempts()
    assert (attempt.attempt, attempt.position, attempt.first_seq, attempt.kept_until) == (1, None, 1, None)
    assert (attempt.end_state, attempt.outcome, attempt.reason) == (State.DONE, "done", "all epochs done")
    assert (attempt.ended_ns, attempt.exception, attempt.pid) == (10, "", os.getpid())
    assert (attempt.command, attempt.params) == (["train.py", "--epochs", "3"], {"lr": 0.1})
    assert (attempt.versions, attempt.device) == ({"python": "3.11"}, "cpu")


# --- attempts that go back


def test_rows_past_a_position_are_superseded(run: RunFolder, lease: Lease) -> None:
    """Attempt 2 goes back into attempt 1, attempt 3 into attempt 2, attempt 4 into attempt 1 again."""
    kept: list[int] = []
    for position in (None, 7, 21, 5):
        kept = [seq for seq in kept if seq <= (position or 0)]
        recorder, writer = begin(run, lease, position)
        with writer:
            walk = Walk(recorder, State.IDLE if position is None else State.HALTED)
            if position is not None:
                walk.epoch, walk.batch = 0, 0
                walk.go(Trigger.RESUME, State.BATCH_END)
                walk.go(Trigger.END_EPOCH)
            writer.metrics("train", 0, 0, 0, {"at": recorder.next_seq}, 0)
            writer.metrics("validation/val", 0, -1, 0, {"late": 6.0}, 0, seq=recorder.next_seq - 1)
            walk.epochs(batches=2)
            validation = Walk(recorder, scope=1)
            validation.go(Trigger.BEGIN_EPOCH)
            validation.go(Trigger.END_EPOCH)
            seq = recorder.next_seq - 1
            writer.checkpoint(CheckpointRow(f"c{seq}", seq, 0, 0, State.EPOCH_END, 0, 0))
            writer.end("stopped")
        kept += [row.seq for row in (*walk.recorded, *validation.recorded)]
        with Journal.open(run) as journal:
            assert [row.seq for row in journal.transitions()] == kept
            everything = list(journal.transitions(include_superseded=True))
            assert [row.seq for row in everything] == list(range(1, recorder.next_seq))
            assert [row.seq for row in everything if not row.superseded] == kept
            shown = [int(row.value) for row in journal.metrics(key="at")]
            assert shown == [value for value in shown if value in kept]
            assert [row.seq for row in journal.checkpoints()] == [kept[-1]]
            assert len(journal.checkpoints(include_superseded=True)) == recorder.attempt
            assert journal.last_transition() == walk.recorded[-1]
        assert [seq for (seq,) in query(run, "SELECT seq FROM transitions ORDER BY seq")] == kept
        flags = query(run, "SELECT seq, superseded FROM all_transitions ORDER BY seq")
        assert flags == [(seq, int(seq not in kept)) for seq in range(1, recorder.next_seq)]
    with Journal.open(run) as journal:
        assert [attempt.kept_until for attempt in journal.attempts()] == [5, 5, 5, None]
        assert [row.attempt for row in journal.metrics(key="at")] == [1, 4]
        assert len(list(journal.metrics(key="at", include_superseded=True))) == 4
        assert query(run, "SELECT count(*) FROM all_metrics WHERE key = 'at' AND superseded") == [(2,)]


def interrupted(run: RunFolder, lease: Lease, chance: random.Random, attempts: int) -> None:
    """A journal of a training with two phases and validation that goes back at random, several times."""
    standing: list[tuple[int, int, int, State]] = []
    for number in range(attempts):
        position, epoch, batch, state = 0, -1, -1, State.IDLE
        if number:
            standing = standing[: chance.randrange(1, len(standing) + 1)]
            position, epoch, batch, state = standing[-1]
        recorder, writer = begin(run, lease, position if number else None)
        with writer:
            walk = Walk(recorder, State.HALTED if number else State.IDLE)
            validation = Walk(recorder, scope=1)
            walk.epoch, walk.batch = epoch, batch
            if number:
                state = State.BATCH_END if state is State.HALTED else state
                walk.go(Trigger.RESUME, state)
            for _ in range(chance.randrange(1, 60)):
                walk.go(*next_move(walk, chance), loss=chance.choice([NAN, 0.5, PENDING]), phase=0)
                if walk.state is State.EPOCH_END:
                    validation.state = State.IDLE
                    validation.epochs(batches=2)
            if number < attempts - 1 and chance.random() < 0.5 and walk.state is State.BATCH_END:
                walk.go(Trigger.HALT)
            writer.end("stopped")
        standing += [(row.seq, row.epoch, row.batch, row.dest) for row in walk.recorded]


def next_move(walk: Walk, chance: random.Random) -> tuple[Trigger]:
    follows = {
        State.IDLE: Trigger.BEGIN_EPOCH,
        State.EPOCH_START: Trigger.FETCH,
        State.BATCH_START: Trigger.FORWARD,
        State.FORWARD: Trigger.BACKWARD,
        State.BACKWARD: chance.choice([Trigger.STEP, Trigger.END_BATCH]),
        State.STEP: Trigger.END_BATCH,
        State.BATCH_END: Trigger.END_EPOCH if walk.batch >= 2 else Trigger.FETCH,
        State.EPOCH_END: Trigger.BEGIN_EPOCH,
    }
    return (follows[walk.state],)


@pytest.mark.parametrize("seed", range(6))
def test_epochs_and_packed_rows_are_read_as_a_scan_reads_them(
    run: RunFolder, lease: Lease, seed: int
) -> None:
    interrupted(run, lease, random.Random(seed), attempts=1 + seed)
    with Journal.open(run) as journal:
        everything = list(journal.transitions(include_superseded=True))
        assert any(row.superseded for row in everything) or not seed
        for superseded in (True, False):
            rows = [row for row in everything if superseded or not row.superseded]
            assert repr(list(journal.transitions(include_superseded=superseded))) == repr(rows)
            for epoch in range(-1, 5):
                chosen = [row for row in rows if row.epoch == epoch and row.scope == "train"]
                reading = {"epoch": epoch, "scope": "train", "include_superseded": superseded}
                assert repr(list(journal.transitions(**reading))) == repr(chosen)
                later = [row for row in chosen if row.seq > 40]
                assert repr(list(journal.transitions(after=40, **reading))) == repr(later)
        stands = journal.standing()
        assert repr(list(journal.losses(stands=stands))) == repr(list(journal.losses()))
        packed = [
            (seq, row.attempt, row.scope, row.epoch, row.batch, *move, row.superseded)
            for row in journal.packed()
            for seq, move in zip(range(row.first, row.last + 1), row.chain.moves, strict=True)
        ]
    columns = ["seq", "attempt", "scope", "epoch", "batch", "trigger", "source", "dest", "superseded"]
    assert packed == [tuple(getattr(row, name) for name in columns) for row in everything]


@pytest.mark.parametrize("seed", range(12))
def test_losses_and_places_are_found_as_a_scan_finds_them(run: RunFolder, lease: Lease, seed: int) -> None:
    chance = random.Random(seed)
    with Journal.open(run) as journal:
        assert list(journal.losses()) == []
        assert journal.find(0, 0, State.FORWARD) is None
    interrupted(run, lease, chance, attempts=1 + seed % 6)
    with Journal.open(run) as journal:
        standing = list(journal.transitions(scope="train"))
        losses = [
            Loss(row.seq, row.epoch, row.batch, row.phase, row.loss)
            for row in standing
            if row.trigger is Trigger.FORWARD
        ]
        assert repr(list(journal.losses())) == repr(losses)
        newest = journal.newest_seq()
        for after in range(0, newest + 2, 7):
            for until in (None, after, after + 1, after + 30):
                chosen = [loss for loss in losses if after < loss.seq <= (newest if until is None else until)]
                assert repr(list(journal.losses(after, until))) == repr(chosen)
        for state in State:
            for epoch in range(-1, 4):
                for batch in (None, -1, 0, 1, 2, 5):
                    matches = (
                        row
                        for row in standing
                        if row.dest is state and row.epoch == epoch and batch in (None, row.batch)
                    )
                    assert repr(journal.find(epoch, batch, state)) == repr(next(matches, None))


def test_a_phase_is_found(run: RunFolder, writing: Writing) -> None:
    recorder, writer = writing
    walk = Walk(recorder)
    walk.go(Trigger.BEGIN_EPOCH)
    walk.go(Trigger.FETCH)
    for phase in (0, 1):
        for trigger in (Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP):
            walk.go(trigger, phase=phase, loss=float(phase) if trigger is Trigger.FORWARD else NAN)
    writer.sync()
    with Journal.open(run) as journal:
        assert [(loss.phase, loss.loss) for loss in journal.losses()] == [("", 0.0), ("generator", 1.0)]
        assert [
            found.seq if found else None
            for found in (journal.find(0, 0, State.FORWARD, phase) for phase in (None, "", "generator", "x"))
        ] == [3, 3, 6, None]


def test_long_stretches_of_losses_are_read_page_by_page(
    run: RunFolder, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, writer = writing
    walk = Walk(recorder).epochs(epochs=2, batches=50)
    writer.sync()
    monkeypatch.setattr("tracking.places.LOSSES_AT_ONCE", 7)
    with Journal.open(run) as journal:
        found = [(loss.seq, loss.loss) for loss in journal.losses(after=20)]
    assert found == [(row.seq, row.loss) for row in walk.recorded[20:] if row.loss is not None]


def test_a_metric_is_superseded_with_the_transition_that_measured_it(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease)
    with writer:
        walk = Walk(recorder)
        walk.go(Trigger.BEGIN_EPOCH)
        for batch in range(3):
            for trigger in (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP):
                walk.go(trigger)
            writer.metrics("train", 0, batch, batch, {"loss": 1.0}, 0)  # in the work of end_batch
            walk.go(Trigger.END_BATCH)
        writer.metrics("train", 0, 0, 0, {"norm": 1.0}, 0, seq=6)  # arrives two batches late
        writer.end("stopped")
    for position, losses, norms in ((11, [0, 1], [0]), (10, [0], [0]), (6, [0], [0]), (5, [], [])):
        recorder, writer = begin(run, lease, position)
        with writer, Journal.open(run) as journal:
            assert [row.batch for row in journal.metrics(key="loss")] == losses
            assert [row.batch for row in journal.metrics(key="norm")] == norms
            writer.end("stopped")


@pytest.mark.parametrize("position", [None, 1000, -1])
def test_positions_that_cannot_be_gone_back_to(run: RunFolder, lease: Lease, position: int | None) -> None:
    with pytest.raises(JournalError, match="expected None for the first attempt"):
        begin(run, lease, 3)
    recorder, writer = begin(run, lease)
    with writer:
        Walk(recorder).epochs()
        writer.end("stopped")
    with pytest.raises(
        JournalError, match=r"expected None for the first attempt|cannot go back to transition"
    ):
        begin(run, lease, position)
    with Journal.open(run) as journal:
        assert len(journal.attempts()) == 1


def test_superseded_rows_and_validation_cannot_be_gone_back_to(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease)
    with writer:
        Walk(recorder).epochs()
        Walk(recorder, scope=1).go(Trigger.BEGIN_EPOCH)
        writer.end("stopped")
        validation = recorder.next_seq - 1
    with pytest.raises(JournalError, match="cannot go back to transition"):
        begin(run, lease, validation)
    begin(run, lease, 5)[1].close()
    with pytest.raises(JournalError, match="cannot go back to transition 6"):
        begin(run, lease, 6)
    begin(run, lease, 0)[1].close()


def test_the_lease_must_be_the_runs(run: RunFolder, tmp_path: Path) -> None:
    other = create_run(tmp_path, "other")
    with Lease.acquire(other) as wrong, pytest.raises(JournalError, match="expected the lease of this run"):
        begin(run, wrong)
    lease = Lease.acquire(run)
    lease.release()
    with pytest.raises(JournalError, match="released"):
        begin(run, lease)


# --- storage that fails


def writer_with_warnings(
    run: RunFolder, lease: Lease, capacity: int = 256
) -> tuple[Recorder, JournalWriter, list[str]]:
    told: list[str] = []
    recorder, writer = open_attempt(run, lease, start(), SCOPES, PHASES, capacity=capacity, warn=told.append)
    return recorder, writer, told


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def fill_disk(writer: JournalWriter) -> None:
    """The journal cannot grow any more."""
    pages = writer._connection.execute("PRAGMA page_count").fetchone()[0]
    writer._connection.execute(f"PRAGMA max_page_count = {pages}")


def make_room(writer: JournalWriter) -> None:
    writer._connection.execute("PRAGMA max_page_count = 1000000")


def test_a_full_disk_is_survived(run: RunFolder, lease: Lease) -> None:
    """One warning at once; everything is there when there is room again."""
    recorder, writer, told = writer_with_warnings(run, lease, capacity=4096)
    with writer:
        walk = Walk(recorder).epochs()
        writer.sync()
        fill_disk(writer)
        walk.epochs(epochs=3, batches=100)
        writer.metrics("train", 0, 0, 0, {"loss": 1.0}, 0)
        with pytest.raises(JournalError, match="full"):
            writer.sync(timeout_s=0.6)
        assert len(told) == 1
        assert "cannot write the journal (database or disk is full)" in told[0]
        assert writer.failure is None
        with Journal.open(run) as journal:
            assert list(journal.transitions(live=True)) == walk.recorded
        make_room(writer)
        writer.sync()
        walk.go(Trigger.FINISH)
        writer.end("done")
        assert len(told) == 1
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded
        assert len(list(journal.metrics())) == 1
        assert "could not be written for a while" in journal.logs()[0].message


def test_a_full_disk_is_survived_where_warnings_are_errors(
    run: RunFolder, lease: Lease, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder, writer = begin(run, lease)
        with writer:
            walk = Walk(recorder).epochs()
            writer.sync()
            fill_disk(writer)
            walk.epochs(epochs=1, batches=100)
            with pytest.raises(JournalError, match="full"):
                writer.sync(timeout_s=0.6)
            assert "cannot write the journal (database or disk is full)" in capfd.readouterr().err
            make_room(writer)
            writer.sync()
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded


def test_a_lasting_failure_is_told_in_time_to_halt(run: RunFolder, lease: Lease) -> None:
    recorder, writer, told = writer_with_warnings(run, lease, capacity=256)
    walk = Walk(recorder)
    walk.go(Trigger.BEGIN_EPOCH)
    with writer:
        writer.sync()
        writer._connection.execute("PRAGMA max_page_count = 1")
        batches = 0
        while writer.failure is None:  # the loop, which looks at every batch
            for trigger in BATCH:
                walk.go(trigger, loss=1.0 if trigger is Trigger.FORWARD else NAN)
            time.sleep(0.005)
            batches += 1
        assert isinstance(writer.failure, JournalStalledError)
        assert batches >= 140
        assert 0.75 <= recorder.fill < 0.8
        walk.go(Trigger.HALT, note="the journal cannot be written")  # there is room for this
        with pytest.raises(JournalStalledError, match="resume the run"):  # but not for ever
            repeat(1000, lambda _: put(recorder, 0, 0, 0, 0, 0, 0, 0, NAN))
    assert len(told) == 1  # nothing but transitions was waiting, and they are safe
    settled = settle(run, lease)
    assert settled is not None
    assert settled.drained > 140 * 5
    with Journal.open(run) as journal:
        assert list(journal.transitions())[: len(walk.recorded)] == walk.recorded


def test_what_is_lost_at_the_end_is_told(run: RunFolder, lease: Lease) -> None:
    recorder, writer, told = writer_with_warnings(run, lease)
    writer.sync()
    writer._connection.execute("PRAGMA max_page_count = 1")
    Walk(recorder).epochs(batches=30)
    for number in range(50):
        writer.log("INFO", "x" * 5000, number)
    writer.close()
    assert "50 metrics and messages were lost" in told[-1]
    assert len(told) == 2
    settled = settle(run, lease)
    assert settled is not None
    assert settled.drained == 152


def test_a_queue_out_of_bounds_raises(run: RunFolder, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracking.writer._MOST_QUEUED", 100)
    _, writer, told = writer_with_warnings(run, lease)
    with writer:
        writer.sync()
        writer._connection.execute("PRAGMA max_page_count = 1")
        for number in range(150):
            writer.log("INFO", "x" * 5000, number)
        wait_until(lambda: writer.failure)
        with pytest.raises(JournalStalledError):
            repeat(150, lambda number: writer.log("INFO", "x", number))
        assert writer.queued == 200
        writer._connection.execute("PRAGMA max_page_count = 1000000")
        writer.sync()
        assert writer.failure is None
        assert len(told) == 1
    with Journal.open(run) as journal:
        assert len(journal.logs()) == 201


def test_a_file_locked_by_another_program(run: RunFolder, lease: Lease) -> None:
    recorder, writer, told = writer_with_warnings(run, lease)
    with writer:
        script = (
            "import sqlite3, sys\n"
            "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "connection.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", script, str(run.journal)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            other.stdout.readline()
            walk = Walk(recorder).epochs()
            wait_until(lambda: told)
            assert "database is locked" in told[0]
            other.stdin.close()
        writer.sync()
        assert len(told) == 1
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded


def test_a_write_that_fails_at_any_byte(tmp_path: Path) -> None:
    """The kernel refuses to let files grow, at one size after another, until a run meets no fault."""
    script = """
import pathlib, resource, sys
from tracking.journal import *; from tracking.runs import *; from walk import *
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def told_with(limit):
    told = []
    run = create_run(pathlib.Path(sys.argv[1]), "limited")
    with Lease.acquire(run) as lease:
        recorder, writer = open_attempt(run, lease, start(), SCOPES, PHASES, capacity=256, warn=told.append)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        walk = Walk(recorder).epochs(batches=20)
        try:
            writer.sync(timeout_s=0.1)
        except JournalError:
            walk.go(Trigger.BEGIN_EPOCH)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        writer.end("stopped")
        writer.close()
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded
    return told
limit = faults = 0
while told := told_with(limit):
    assert len(told) == 1, told
    limit, faults = limit + 5000, faults + 1
print(faults)
"""
    assert int(python(script, tmp_path)) >= 3


def test_nothing_is_left_of_an_attempt_without_space(run: RunFolder, lease: Lease) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(RecorderError, match="cannot allocate"):
            begin(run, lease)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder, writer = begin(run, lease)
    with writer:
        assert recorder.attempt == 1


# --- files that are damaged, foreign or new


def test_a_wal_cut_at_any_byte(run: RunFolder, lease: Lease, tmp_path: Path) -> None:
    recorder, writer = begin(run, lease)
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    with writer:
        walk = Walk(recorder)
        for _ in range(12):
            walk.epochs(batches=2)
            writer.sync()
        # By another process: closing the files here would drop SQLite's locks.
        subprocess.run(["cp", "-r", run.path, whole], check=True)
    wal = (whole / "journal.sqlite-wal").read_bytes()
    assert len(wal) > 50_000
    lengths = set()
    for length in [*range(0, len(wal), 3001), len(wal)]:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        shutil.copy(whole / "journal.sqlite", copy)
        (copy / "journal.sqlite-wal").write_bytes(wal[:length])
        with Journal.open(RunFolder(copy)) as journal:
            found = list(journal.transitions())
        assert found == walk.recorded[: len(found)]
        lengths.add(len(found))
        # What the cut took is in the recorder still, and comes back when the run is settled.
        shutil.copy(whole / "recorder.bin", copy)
        if found:
            settle(RunFolder(copy))
            with Journal.open(RunFolder(copy)) as journal:
                assert list(journal.transitions())[:-1] == walk.recorded
    assert {0, len(walk.recorded)} < lengths
    assert len(lengths) > 5


def test_files_that_are_no_journal(run: RunFolder) -> None:
    whole = run.journal.read_bytes()
    for content in (b"", b"garbage" * 1000, whole[:100], b"\0" * 8192, whole[:4096] + b"\xff" * 8192):
        run.journal.write_bytes(content)
        with pytest.raises(JournalDamagedError, match=r"journal\.sqlite: found a file that is no journal"):
            Journal.open(run)
        with pytest.raises(JournalError):
            settle(run)
    run.journal.unlink()
    with pytest.raises(JournalError, match="there is no journal here"):
        Journal.open(run)


def test_a_newer_format_is_refused(run: RunFolder, lease: Lease) -> None:
    connection = sqlite3.connect(run.journal)
    with connection:
        connection.execute("UPDATE run SET value = '4' WHERE key = 'format'")
    connection.close()
    with pytest.raises(JournalFormatError, match="found journal format 4, expected 3"):
        Journal.open(run)
    with pytest.raises(JournalFormatError):
        begin(run, lease)


@pytest.mark.parametrize("ending", ["killed", "closed"])
def test_a_dead_run_is_read_without_the_right_to_write(ending: str) -> None:
    """By another user, from a folder that nobody may write to."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        writing = (
            "import pathlib, os, signal, sys\n"
            "from tracking.runs import *; from walk import *\n"
            "run = create_run(pathlib.Path(sys.argv[1]), 'dead'); lease = Lease.acquire(run)\n"
            "recorder, writer = begin(run, lease)\n"
            "Walk(recorder).epochs(); writer.sync(); Walk(recorder, State.EPOCH_END).epochs()\n"
            "if sys.argv[2] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
            "writer.end('stopped'); writer.close()\n"
        )
        subprocess.run([sys.executable, "-c", writing, str(root), ending], env=ENVIRONMENT, check=False)
        (folder,) = root.iterdir()
        folder.chmod(0o555)
        for file in folder.iterdir():
            file.chmod(0o555 if file.is_dir() else 0o444)
        reading = (
            "import os, pathlib, sys, urllib.parse\n"  # nobody may not be able to read where Python lies
            "from tracking.journal import *; from tracking.runs import *\n"
            "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
            "run = RunFolder(pathlib.Path(sys.argv[1]))\n"
            "with Journal.open(run) as journal: print(len(list(journal.transitions(live=True))))\n"
            "print(lease_holder(run))\n"
        )
        assert python(reading, folder).split() == ["34", "None"]
    finally:
        for folder in root.iterdir():
            folder.chmod(0o755)
        shutil.rmtree(root)


def test_types_of_file_systems() -> None:
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "30 22 0:30 / /home rw - nfs4 server:/home rw\n"
        "31 30 0:31 / /home/me/my\\040data rw master:2 - fuse.sshfs me@there: rw\n"
        "32 22 0:32 / /scratch rw - lustre x rw\n"
        "33 32 0:33 / /scratch rw - xfs /dev/b rw\n"
    )
    kinds = {
        "/": "ext4",
        "/homes/x": "ext4",
        "/home/me/runs": "nfs4",
        "/home/me/my data/runs": "fuse.sshfs",
        "/scratch/a": "xfs",
    }
    assert {path: schema.filesystem_type(Path(path), mounts) for path in kinds} == kinds
    assert [kind for kind in kinds.values() if schema.is_local(kind)] == ["ext4", "ext4", "xfs"]
    assert schema.filesystem_type(Path("/"), "") == ""
    assert schema.filesystem_type(Path("/").resolve()) != ""


def test_a_run_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "filesystem_type", lambda path: "nfs4")
    run = create_run(tmp_path, "far")
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            assert "file system of type 'nfs4' the journal is kept with journal_mode=delete" in writer.notice
            walk = Walk(recorder).epochs()
            writer.sync()
            assert not run.journal.with_name("journal.sqlite-wal").exists()
            with Journal.open(run) as journal:
                assert list(journal.transitions()) == walk.recorded
        monkeypatch.undo()  # moved to a local one
        recorder, writer = begin(run, lease, position=2)
        with writer:
            assert writer.notice == ""
            assert query(run, "PRAGMA journal_mode") == [("wal",)]


def test_a_local_run_says_nothing_and_waits_for_the_disk(writing: Writing) -> None:
    _, writer = writing
    assert writer.notice == ""
    assert writer._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- forked children, threads, closing


def test_a_forked_child_leaves_the_journal_alone(run: RunFolder, lease: Lease) -> None:
    """It ends the ordinary way, collecting everything it inherited, while its parent goes on writing."""
    script = (
        "import gc, os, pathlib, sys\n"
        "from tracking.runs import *; from tracking.journal import *; from walk import *\n"
        "run = RunFolder(pathlib.Path(sys.argv[1])); lease = Lease.acquire(run)\n"
        "recorder, writer = begin(run, lease)\n"
        "walk = Walk(recorder).epochs(); writer.sync()\n"
        "reader = Journal.open(run)\n"
        "sys.stdout.flush()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    paths = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\n"
        "    names = [os.readlink(path) for path in paths if os.path.exists(path)]\n"
        "    assert not [name for name in names if str(run.path) in name], names\n"
        "    for use in (writer.sync, lambda: Journal.open(run), reader.newest_seq, lambda: settle(run)):\n"
        "        try: use()\n"
        "        except JournalError: continue\n"
        "        except LeaseHeldError: continue\n"
        "        assert use() is None, use\n"
        "    files = [open(os.devnull) for _ in range(20)]\n"
        "    writer.close(); reader.close(); del writer, reader, walk; gc.collect()\n"
        "    [file.fileno() for file in files if os.fstat(file.fileno())]\n"
        "    sys.exit(5)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5\n"
        "assert pathlib.Path(str(run.journal) + '-wal').stat().st_size > 0\n"
        "walk.epochs(); writer.sync()\n"
        "assert list(reader.transitions()) == walk.recorded\n"
        "writer.end('done'); writer.close(); reader.close()\n"
        "print('fine')\n"
    )
    lease.release()
    assert python(script, run.path) == "fine\n"
    assert query(run, "PRAGMA integrity_check") == [("ok",)]


def test_closing_writes_what_is_left_and_may_be_repeated(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease)
    walk = Walk(recorder).epochs()
    writer.log("INFO", "the last words")
    writer.close()
    writer.close()
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded
        assert [row.message for row in journal.logs()] == ["the last words"]
    with pytest.raises(JournalError, match="closed"):
        writer.sync()
    assert not [thread for thread in threading.enumerate() if thread.name == "interlock-journal"]


def test_the_thread_drains_by_itself(run: RunFolder, writing: Writing) -> None:
    recorder, _ = writing
    Walk(recorder).epochs()
    wait_until(lambda: recorder.fill == 0, timeout_s=5)
    with Journal.open(run) as journal:
        assert journal.newest_seq() == recorder.next_seq - 1


def test_a_small_ring_never_stops_a_fast_loop_for_good(run: RunFolder, lease: Lease) -> None:
    recorder, writer = begin(run, lease, capacity=256)
    with writer:
        walk = Walk(recorder).epochs(epochs=2, batches=1500)
        writer.sync()
    with Journal.open(run) as journal:
        assert list(journal.transitions()) == walk.recorded


def test_values_that_are_no_numbers_are_refused_at_the_call(writing: Writing) -> None:
    _, writer = writing
    with pytest.raises((TypeError, ValueError)):
        writer.metrics("train", 0, 0, 0, {"loss": "low"}, 0)  # type: ignore[dict-item]
    writer.sync()


def test_settings_that_json_cannot_hold_are_kept_as_text(run: RunFolder, lease: Lease) -> None:
    from dataclasses import replace

    odd = replace(start(), params={"path": Path("/data"), "lr": 0.5})
    _, writer = open_attempt(run, lease, odd, SCOPES, PHASES)
    writer.close()
    assert json.loads(str(query(run, "SELECT params FROM attempts")[0][0])) == {"path": "/data", "lr": 0.5}
