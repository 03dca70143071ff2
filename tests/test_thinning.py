"""Means of several batches: every value is in one point and no more; the pace fits the server; all without one."""

import csv
import gzip
import math
import sqlite3
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deliveries import BATCHES, Training
from tracking.artifacts import write_metrics
from tracking.delivery import Point, Remote
from tracking.journal import Journal
from tracking.outbox import Outbox, close_windows, select
from tracking.rows import Measured
from tracking.runs import create_run
from tracking.thinning import Pace, Window

REMOTE = Remote("r1", False, {}, "", "mlflow ui")


def value_of(key: str, step: int) -> float:
    return step * step + len(key)


def rows_of(attempts: list[tuple[int, int]], sparse: int) -> list[Measured]:
    """For each attempt the batches after the first number up to the second; a metric that only some batches have."""
    found: list[Measured] = []
    for attempt, (first, last) in enumerate(attempts, 1):
        for step in range(first + 1, last + 1):
            keys = ("loss", "rare") if step % sparse == 0 else ("loss",)
            values = tuple((value_of(key, step),) for key in keys)
            number, time_ns = 8 * (len(found) + 1), (attempt * 10_000 + step) * 1_000_000
            found.append(row(attempt, number, step, step, time_ns, keys, values))
            if step % 7 == 0:
                number = 8 * (len(found) + 1)
                found.append(row(attempt, number, -1, step, number, ("lr",), ((0.1,),)))
    return found


def row(
    attempt: int,
    number: int,
    batch: int,
    step: int,
    time_ns: int,
    keys: tuple[str, ...],
    values: tuple[tuple[float], ...],
) -> Measured:
    return Measured(attempt, "train", 0, False, keys, (number,), (batch,), (step,), (time_ns,), values)


def loss_of(step: int, value: float, time_ns: int) -> Measured:
    return row(1, 8 * step, step - 1, step, time_ns, ("loss",), ((value,),))


def together(rows: list[Measured]) -> list[Measured]:
    """Batches that follow each other and have the same keys as one, as a journal gives them."""
    found: list[Measured] = []
    for one in rows:
        before = found[-1] if found else None
        if before and (before.attempt, before.keys) == (one.attempt, one.keys):
            found[-1] = replace(
                before,
                ids=before.ids + one.ids,
                batches=before.batches + one.batches,
                steps=before.steps + one.steps,
                times_ns=before.times_ns + one.times_ns,
                columns=tuple(a + b for a, b in zip(before.columns, one.columns, strict=True)),
            )
        else:
            found.append(one)
    return found


@given(
    ends=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=4),
    sparse=st.integers(1, 9),
    data=st.data(),
)
def test_each_value_is_in_one_point(
    tmp_path_factory: pytest.TempPathFactory, ends: list[tuple[int, int]], sparse: int, data: st.DataObject
) -> None:
    """However the rows are cut into flights, whatever `every` becomes, however often the shipper dies."""
    attempts, highest = [], 0
    for back, on in ends:
        start = max(0, highest - back)
        attempts.append((start, start + on))
        highest = max(highest, start + on)
    rows = rows_of(attempts, sparse)
    path = tmp_path_factory.mktemp("outbox") / "outbox.sqlite"
    outbox = Outbox.open(path)
    outbox.begin("here", "settings", REMOTE, 1)
    points: list[Point] = []
    at = 0
    while at < len(rows):
        page = rows[at : at + data.draw(st.integers(1, 50))]
        if data.draw(st.booleans()):
            page = together(page)
        flight = select(page, outbox.marks, str, outbox.windows, data.draw(st.sampled_from([1, 2, 4, 16])))
        assert flight is not None
        if flight.points:
            outbox.depart(flight)
        if data.draw(st.booleans()):  # died before the answer: the flight is what is sent again
            outbox.close()
            outbox = Outbox.open(path)
            flight = outbox.flight() or flight
        outbox.arrived(flight)
        points += flight.points
        at = next((n for n, one in enumerate(rows) if one.ids[0] > outbox.cursor), len(rows))
    if (last := close_windows(outbox.cursor, outbox.windows)) is not None:
        points += last.points
        outbox.arrived(last)
    assert not outbox.windows
    outbox.close()

    measured = {(f"batch/{key}", one.steps[0]) for one in rows if one.batches[0] >= 0 for key in one.keys}
    for key in ("batch/loss", "batch/rare"):
        steps = sorted(step for name, step in measured if name == key)
        ends_of = sorted(point.step for point in points if point.key == key)
        assert len(ends_of) == len(set(ends_of))
        means = {point.step: point.value for point in points if point.key == key}
        for before, end in pairwise([0, *ends_of]):
            within = [value_of(key.removeprefix("batch/"), step) for step in steps if before < step <= end]
            assert means[end] == sum(within) / len(within)
        assert (ends_of[-1:] or [0]) == (steps[-1:] or [0])
    epochs = [point.step for point in points if point.key == "train/lr"]
    assert sorted(epochs) == sorted({one.steps[0] for one in rows if one.batches[0] < 0}), (
        "epochs are never thinned"
    )


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1, 4]))
@example(-0.0, 4)
def test_a_single_batch_is_itself(value: float, every: int) -> None:
    flight = select([loss_of(4, value, 5_000_000)], {}, every=every)
    assert flight is not None
    assert not flight.windows
    (point,) = flight.points
    assert repr(point) == repr(Point("batch/loss", 4, 5, value))


def test_a_window_ends_at_a_multiple_and_has_the_last_batches_step_and_time() -> None:
    rows = [loss_of(n, float(n), n * 1_000_000) for n in range(1, 12)]
    flight = select(rows, {}, str, {}, 4)
    assert flight is not None
    assert flight.points == (Point("batch/loss", 4, 4, 2.5), Point("batch/loss", 8, 8, 6.5))
    assert flight.windows == {"batch/loss": Window(11, 11, 30.0, 3)}
    later = select([loss_of(12, 2.0, 12_000_000)], flight.marks, str, flight.windows)
    assert later is not None
    # Every batch is a point again: the window that is open ends before the batch that follows.
    assert later.points == (Point("batch/loss", 11, 11, 10.0), Point("batch/loss", 12, 12, 2.0))


@pytest.mark.parametrize("rate", [0.5, 15.0, 25.0])
def test_a_steady_pace_is_not_thinned(rate: float) -> None:
    most, waiting = simulate(rate, takes=8_000.0, minutes=30)
    assert most == 1
    assert waiting <= rate


@pytest.mark.parametrize("rate", [28.0, 600.0, 1_900.0])
def test_after_the_first_ten_thousand_more_than_twenty_five_values_a_second_are_at_most_eight_points(
    rate: float,
) -> None:
    now = 0.0
    pace = Pace(lambda: now)
    chosen = {}
    while now < 400:
        pace.saw(round(now * rate))
        chosen[round(now * rate)] = pace.every(0)
        now += 0.25
    assert {every for values, every in chosen.items() if values <= 10_000} == {1}
    (steady,) = {every for values, every in chosen.items() if values > max(10_001, 21 * rate)}
    assert rate / 8 <= steady < rate / 4


@given(rate=st.floats(1, 200_000), takes=st.floats(25, 50_000))
@example(rate=110.0, takes=25.0)  # a sending takes 40 seconds
def test_never_behind_for_ever(rate: float, takes: float) -> None:
    """After half an hour at any rate less than ten seconds of the training are waiting."""
    _, waiting = simulate(rate, takes, minutes=30)
    assert waiting <= 10 * rate


def test_an_outage_of_a_night_is_made_up_for_in_full_and_ten_minutes_of_five_thousand_batches_are_not() -> (
    None
):
    now = 0.0
    pace = Pace(lambda: now)
    pace.saw(900_000)
    assert pace.every(900_000) == 1
    assert pace.every(9_000_000) == 8


def simulate(rate: float, takes: float, minutes: int) -> tuple[int, float]:
    """(largest `every`, what waits at the end) with a training and a server of so many values a second."""
    now, made, sent, most = 0.0, 0.0, 0.0, 1
    pace = Pace(lambda: now)
    every = 1
    while now < minutes * 60:
        page = min(made - sent, 1000.0 * every, 20_000.0)
        pace.saw(round(made))
        every = pace.every(round(made - sent - page))
        most = max(most, every)
        points = page / every
        seconds = max(0.05, points / takes)
        pace.took(round(points), seconds)
        now += seconds
        sent += page
        made += rate * seconds
    return most, made - sent


def test_an_outbox_of_format_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        """CREATE TABLE flight (upto INTEGER NOT NULL, points TEXT NOT NULL, marks TEXT NOT NULL);
           INSERT INTO flight VALUES (7, '[["batch/loss", 1, 2, 0.5]]', '{}'); PRAGMA user_version = 1;"""
    )
    connection.close()
    for _ in range(2):
        with Outbox.open(path) as outbox:
            flight = outbox.flight()
            assert flight is not None
            assert (flight.points, flight.windows) == ((Point("batch/loss", 1, 2, 0.5),), {})


def test_all_values_are_in_the_table(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    training = Training(run)
    for _ in range(2 * BATCHES + 1):
        training.batch()
    training.writer.metrics("train", 0, 1, 2, {"odd, one": math.nan, "big": -math.inf}, time.time_ns())
    training.end()
    file = tmp_path / "metrics.csv.gz"
    with Journal.open(run) as journal:
        count = write_metrics(journal, file)
        rows = list(journal.metrics())
    with gzip.open(file, "rt", newline="") as text:
        found = list(csv.DictReader(text))
    assert len(found) == count == len(rows) > 30
    for line, row in zip(found, rows, strict=True):
        assert repr(float(line["value"])) == repr(row.value)
        assert {name: line[name] for name in ("scope", "key")} == {"scope": row.scope, "key": row.key}
        for name in ("attempt", "epoch", "batch", "step", "time_ns"):
            assert int(line[name]) == getattr(row, name)
    first = file.read_bytes()
    with Journal.open(run) as journal:
        write_metrics(journal, file)
    assert file.read_bytes() == first
