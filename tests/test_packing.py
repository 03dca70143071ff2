"""Rows that are packed by the thousand are those that are packed one by one."""

import math
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from states.table import ARCS, Trigger
from tracking.frames import PENDING, decode
from tracking.packed import transitions_between
from tracking.packing import Packer
from tracking.recorder import Chunk, Recorder
from tracking.schema import create_journal
from tracking.values import Values
from walk import put

ARC_NAMES = [(arc.trigger.value, arc.source.value, arc.dest.value) for arc in ARCS]
FORWARD = next(code for code, arc in enumerate(ARCS) if arc.trigger is Trigger.FORWARD)
OTHERS = [code for code, arc in enumerate(ARCS) if arc.trigger is not Trigger.FORWARD][:4]

Batch = tuple[list[int], float, float, int, int, bool, int]
batches = st.lists(
    st.tuples(
        st.lists(st.sampled_from([FORWARD, *OTHERS]), min_size=1, max_size=11),  # what happens in it
        st.sampled_from([0.5, -0.0, math.inf, math.nan, PENDING]),  # the losses of its forwards
        st.sampled_from([math.nan, math.nan, math.nan, 7.0]),  # the losses of all else
        st.integers(0, 1),  # the scope
        st.integers(0, 1),  # the phase
        st.booleans(),  # each begins when the one before is complete
        st.integers(1, 30) | st.sampled_from([50, 101, 120]),  # how often it is repeated
    ),
    min_size=1,
    max_size=8,
)


def recorded(folder: Path, what: list[Batch]) -> Chunk:
    recorder = Recorder.create(
        folder / "recorder.bin", attempt=1, next_seq=1, scopes=["train", "validation/val"],
        phases=["", "generator"], capacity=16384,  # more than 8 times 120 batches can take
    )  # fmt: skip
    number = 0
    for arcs, loss, other, scope, phase, at_once, times in what:
        for _ in range(times):
            number += 1
            for at, arc in enumerate(arcs):
                ns, value = number * 1000 + at * at, loss if arc == FORWARD else other
                took = 2 * at - 1 if at_once and at else number + at
                put(recorder, arc, scope, phase, number // 9, number, ns, took, value)
    chunk, _ = recorder.take()
    recorder.close()
    return chunk


@contextmanager
def begun(journal: Path) -> Iterator[tuple[sqlite3.Connection, Packer]]:
    create_journal(journal, run_id="r", name="r", created_ns=0)
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute(
            """INSERT INTO attempts (attempt, first_seq, started_ns, pid, host, process_started, command, params,
                                     versions, device) VALUES (1, 1, 0, 1, '', 0, '', '', '', '')"""
        )
        yield connection, Packer(connection, 1, ARC_NAMES, ["train", "validation/val"], ["", "generator"])


def packed(journal: Path, chunk: Chunk, *, one_by_one: bool) -> list[Any]:
    with begun(journal) as (connection, packer):
        if one_by_one:
            packer.records(chunk.records)
        else:
            packer.transitions(chunk)
        found = connection.execute("SELECT * FROM all_transitions ORDER BY seq").fetchall()
        rows = connection.execute(
            f"SELECT seq, scope, epoch, batch, word FROM {transitions_between()} ORDER BY seq"
        ).fetchall()
        return [found, rows]


@given(batches, st.integers(0, 7))
def test_many_are_packed_as_each_would_be(what: list[Batch], skip: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        chunk = recorded(Path(name), what)
        first_frame = len(next(decode(chunk.data, {FORWARD}, chunk.since_ns))[0])
        chunk = Chunk(chunk.data, min(skip, first_frame), chunk.since_ns)  # so many were taken before
        whole = packed(Path(name) / "a", chunk, one_by_one=False)
        each = packed(Path(name) / "b", chunk, one_by_one=True)
        assert whole[0] == each[0]
        if not skip:  # what is left of a frame has a row of its own
            assert whole[1] == each[1]
        assert len(whole[0]) == sum(len(arcs) * times for arcs, *_, times in what) - chunk.skip


measured = st.lists(
    st.tuples(
        st.sampled_from(["train", "validation/val", "validation/other"]),
        st.lists(st.sampled_from([f"k{at}" for at in range(12)]), min_size=1, max_size=11, unique=True),
        st.sampled_from([0.5, -0.0, math.inf, -math.inf, math.nan]),
        st.integers(1, 30) | st.sampled_from([50, 101, 120]),  # how often it is measured
    ),
    max_size=8,
)


@given(measured)
def test_values_come_out_as_they_went_in(
    what: list[tuple[str, list[str], float, int]],
) -> None:
    values, expected, seq = Values(lambda: None), [], 0
    for scope, keys, last, times in what:
        for _ in range(times):
            seq += 1
            numbers = (*(seq * 10.0 + at for at in range(len(keys) - 1)), last)
            named = dict(zip(keys, numbers, strict=True))
            values.put(seq, scope, seq // 9, seq % 9, seq, seq * 1000, named)
            expected += [
                (seq, scope, seq // 9, seq % 9, seq, key, "nan" if number != number else number, seq * 1000)
                for key, number in zip(keys, numbers, strict=True)
            ]
    with tempfile.TemporaryDirectory() as name, begun(Path(name) / "a") as (connection, packer):
        packer.metrics(values.take(), values.kinds)
        found = connection.execute(
            "SELECT seq, scope, epoch, batch, step, key, value, time_ns FROM all_metrics ORDER BY id"
        ).fetchall()
    assert found == expected
