"""Blocks of the journal: what is written by the thousand comes out of every reader as it went in."""

import math
import shutil
import sqlite3
import struct
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_packing import ARC_NAMES, FORWARD, begun
from torch import nn

from orchestrator import Trainer
from states.table import ARCS, Arc, State, Trigger
from tracking import blocks
from tracking.frames import PENDING
from tracking.journal import Journal
from tracking.recorder import Chunk, Recorder
from tracking.runs import Lease, RunFolder
from tracking.settling import settle
from tracking.values import ROW, Values
from walk import put

BATCH = [
    ARCS.index(arc)
    for arc in (
        Arc(Trigger.FETCH, State.BATCH_END, State.BATCH_START),
        Arc(Trigger.FORWARD, State.BATCH_START, State.FORWARD),
        Arc(Trigger.BACKWARD, State.FORWARD, State.BACKWARD),
        Arc(Trigger.STEP, State.BACKWARD, State.STEP),
        Arc(Trigger.END_BATCH, State.STEP, State.BATCH_END),
    )
]
doubles = st.floats() | st.floats(-1e-300, 1e-300) | st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]
)  # fmt: skip


def bits(value: Any) -> Any:
    """What tells any double from any other, as SQLite has it."""
    number = float(value)
    return "nan" if math.isnan(number) else struct.pack("<d", number)


def recorded(folder: Path, losses: list[float], took_ns: int = 1000) -> Chunk:
    """Batches of five transitions each, as many as losses."""
    recorder = Recorder.create(
        folder / "recorder.bin", attempt=1, next_seq=1, scopes=["train"], phases=[""], capacity=4096
    )
    now = 0
    for batch, loss in enumerate(losses):
        for at, arc in enumerate(BATCH):
            now += took_ns * (at + 1)
            value = loss if arc == FORWARD else math.nan
            put(recorder, arc, 0, 0, 0, batch, now, took_ns * (at + 1), value)
    chunk, _ = recorder.take()
    recorder.close()
    return chunk


@given(st.lists(doubles, min_size=16, max_size=80))
def test_any_double_comes_out_to_the_bit(numbers: list[float]) -> None:
    with tempfile.TemporaryDirectory() as name, begun(Path(name) / "a") as (connection, packer):
        packer.transitions(recorded(Path(name), numbers))
        values = Values(lambda: None)
        for at, x in enumerate(numbers):
            values.put(at, "train", 0, at, at + 1, at, {"a": x})
        packer.metrics(values.take(), values.kinds)
        assert connection.execute("SELECT count(*) FROM packed_transitions").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM packed_metrics").fetchone() == (0,)
        losses = connection.execute("SELECT loss FROM transitions WHERE trigger = 'forward'").fetchall()
        found = connection.execute("SELECT value FROM metrics").fetchall()
    waits = struct.pack("<d", PENDING)
    for number, (loss,), (value,) in zip(numbers, losses, found, strict=True):
        assert bits(value) == bits(number)
        assert (None if loss is None else bits(loss)) == (
            None if struct.pack("<d", number) == waits else bits(number)
        )


@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0, 1, 10**6, 10**12])), min_size=16, max_size=150)
)
def test_values_of_any_number_at_any_distance(what: list[tuple[int, int]]) -> None:
    time_ns, values, expected = 10**18, Values(lambda: None), []
    for at, (length, later) in enumerate(what):
        time_ns += later
        keys = tuple(f"k{key}" for key in range(length))
        numbers = tuple(at + key / 8 for key in range(length))
        named = dict(zip(keys, numbers, strict=True))
        values.put(at * 9 + length, "train", 2, at, at + 7, time_ns, named)
        expected += [
            (at * 9 + length, 2, at, at + 7, k, n, time_ns) for k, n in zip(keys, numbers, strict=True)
        ]
    with tempfile.TemporaryDirectory() as name, begun(Path(name) / "a") as (connection, packer):
        rows, three = values.take(), 3 * ROW.size
        for part in (rows[:three], rows[three:], rows[:three]):
            packer.metrics(part, values.kinds)
        found = connection.execute("SELECT seq, epoch, batch, step, key, value, time_ns FROM all_metrics")
        again = [row for row in expected if row[2] < 3]
        assert found.fetchall() == [*expected, *again]
        ids = [one for (one,) in connection.execute("SELECT id FROM all_metrics")]
        assert ids == sorted(set(ids))


@given(
    st.lists(st.sampled_from(["", "", "", "a note", "n" * 400]), min_size=16, max_size=150),
    st.integers(5, 60),
)
def test_what_is_worked_on_in_parts_is_whole(notes: list[str], at_once: int) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as name,
        begun(Path(name) / "a") as (connection, packer),
    ):
        patch.setattr(blocks, "_AT_ONCE", at_once)
        recorder = Recorder.create(
            Path(name) / "recorder.bin", attempt=1, next_seq=1, scopes=["train"], phases=[""], capacity=4096
        )
        for batch, note in enumerate(notes):
            for at, arc in enumerate(BATCH):
                put(
                    recorder,
                    arc,
                    0,
                    0,
                    0,
                    batch,
                    50 * batch + 10 * at,
                    10,
                    batch / 8,
                    note * (at == batch % 5),
                )
        chunk, _ = recorder.take()
        recorder.close()
        packer.transitions(chunk)
        columns = "seq, epoch, batch, time_ns, duration_ns, loss, note"
        found = connection.execute(f"SELECT {columns} FROM transitions ORDER BY seq").fetchall()
        assert found == [
            (
                r.seq,
                r.epoch,
                r.batch,
                r.time_ns,
                r.duration_ns,
                r.loss if r.arc == FORWARD else None,
                r.note or None,
            )
            for r in chunk.records
        ]
        assert len(found) == 5 * len(notes)


@pytest.mark.parametrize("took_ns", [1, 10**9])
def test_the_losses_of_a_block_may_come_late(tmp_path: Path, took_ns: int) -> None:
    with begun(tmp_path / "a") as (connection, packer):
        packer.transitions(recorded(tmp_path, [PENDING] * 100, took_ns))
        forwards = [batch * 5 + 2 for batch in range(100)]
        query = "SELECT seq, loss FROM transitions WHERE loss IS NOT NULL"
        assert connection.execute("SELECT count(*) FROM packed_transitions").fetchone() == (0,)
        assert connection.execute(query).fetchall() == []
        for seq in forwards:
            packer.late_loss(seq, seq / 3)
            packer.late_loss(seq + 1, 1.0)  # is no forward
        packer.late_loss(501, 1.0)  # is not there
        assert connection.execute(query).fetchall() == [(seq, seq / 3) for seq in forwards]
        durations = connection.execute("SELECT DISTINCT trigger, duration_ns FROM transitions").fetchall()
        assert durations == [(ARC_NAMES[arc][0], took_ns * (at + 1)) for at, arc in enumerate(BATCH)]


def test_a_training_is_written_in_blocks(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    data = [(torch.randn(4, 2), torch.randint(2, (4,)))] * 600
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), data, epochs=1, accumulate=2, log=None, track=None, root=tmp_path,
        checkpoint=None,
    )  # fmt: skip
    run = RunFolder(trainer.fit().run)
    with closing(sqlite3.connect(run.journal)) as connection:
        for table in ("transition_blocks", "metric_blocks"):
            rows = connection.execute(f"SELECT coalesce(sum(rows), 0), max(length(data)) FROM {table}")
            count, longest = rows.fetchone()
            assert count > 300
            assert longest <= 4000  # more does not fit on a page, and each look at it would copy it
        seqs = [seq for (seq,) in connection.execute("SELECT seq FROM transitions")]
        assert seqs == list(range(1, 600 * 4 + 300 + 4))
    with Journal.open(run) as journal:
        assert [row.seq for row in journal.transitions()] == seqs
        assert [row.seq for row in journal.transitions(epoch=0)] == seqs
        assert [row.batch for row in journal.metrics(key="loss")] == [*range(600), -1]
        assert len(list(journal.losses())) == 600
        for batch in (0, 77, 599):
            found = journal.find(0, batch, State.FORWARD)
            assert found is not None
            assert (found.batch, found.trigger) == (batch, Trigger.FORWARD)


def told(journal: Path) -> list[list[Any]]:
    """What the journal's own views say, which an older interlock made."""
    with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as connection:
        return [
            connection.execute("SELECT * FROM all_transitions ORDER BY seq").fetchall(),
            connection.execute("SELECT * FROM all_metrics ORDER BY id").fetchall(),
        ]


def test_a_journal_of_format_2_is_read_and_gone_on_with(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "two-20261127-004012-1lrg")
    run.path.mkdir()
    shutil.copy(Path(__file__).parent / "formats" / "journal-2.sqlite", run.journal)
    before = told(run.journal)
    assert [len(rows) for rows in before] == [462, 255]
    for _ in range(2):  # as it is, and after it was opened to be written
        with Journal.open(run) as journal:
            rows = list(journal.transitions(include_superseded=True))
            assert [(row.seq, row.epoch, row.batch, row.dest.value, row.time_ns, row.loss, row.superseded)
                    for row in rows] == [
                (seq, epoch, batch, dest, time_ns, loss, bool(gone))
                for seq, _, _, epoch, batch, _, _, _, dest, time_ns, _, loss, _, gone in before[0]
            ]  # fmt: skip
            values = journal.metrics(include_superseded=True)
            assert [(one.id, one.key, one.value) for one in values] == [
                (row[0], row[6], float(row[7])) for row in before[1]
            ]
            assert journal.newest_seq() == 462
            assert sum(packed.last - packed.first + 1 for packed in journal.packed()) == 462
        with Lease.acquire(run) as lease:
            settle(run, lease)
        assert told(run.journal) == before
    with closing(sqlite3.connect(run.journal)) as connection:
        assert connection.execute("SELECT value FROM run WHERE key = 'format'").fetchone() == ("3",)
