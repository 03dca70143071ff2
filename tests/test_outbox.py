"""What is sent, when it is sent again, and that it arrives once: the outbox without a server."""

import math
import signal
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracking.delivery import Point, Remote, Unavailable
from tracking.line import Line
from tracking.outbox import NOTHING_SENT, Flight, Mark, Outbox, OutboxError, metric_name, read_outbox, select
from tracking.rows import Measured

REMOTE = Remote("r1", False, {}, "", "mlflow ui")


def row(
    number: int, attempt: int, step: int, key: str = "loss", scope: str = "train", batch: int = 0
) -> Measured:
    time_ns, values = (number * 1_000_000,), ((step / 7,),)
    return Measured(attempt, scope, 0, False, (key,), (number,), (batch,), (step,), time_ns, values)


def begun(path: Path) -> Outbox:
    outbox = Outbox.open(path)
    outbox.begin("here", "settings", REMOTE, 1)
    return outbox


@pytest.mark.parametrize(
    ("scope", "batch", "name"),
    [
        ("train", 3, "batch/loss"),
        ("train", -1, "train/loss"),
        ("validation/val", -1, "val/loss"),
        ("validation/val", 3, "val/loss"),
        ("validation/test set", -1, "test set/loss"),
    ],
)
def test_names(scope: str, batch: int, name: str) -> None:
    assert metric_name(scope, batch, "loss") == name


def test_nothing_to_select() -> None:
    assert select([], {}) is None


def test_replayed_steps_are_not_selected_but_move_the_cursor() -> None:
    first = select([row(1, 1, 1), row(2, 1, 2), row(3, 1, 3)], {})
    assert first is not None
    assert [point.step for point in first.points] == [1, 2, 3]
    again = select([row(9, 2, 2), row(10, 2, 3)], first.marks)
    assert again == Flight(10, (), {"batch/loss": Mark(2, 3, 3)})
    further = select([row(11, 2, 4), row(12, 2, 3, key="new")], again.marks)
    assert further is not None
    assert [(point.key, point.step) for point in further.points] == [("batch/loss", 4), ("batch/new", 3)]


def test_a_value_that_arrives_late_is_no_replay() -> None:
    first = select([row(1, 1, 1), row(2, 1, 5)], {})
    assert first is not None
    late = select([row(3, 1, 4)], first.marks)
    assert late is not None
    assert [point.step for point in late.points] == [4]


class Died(Exception):
    pass


class Store:
    """Drops exact repeats, as SQL stores do."""

    def __init__(self) -> None:
        self.points: set[tuple[str, int, int, float]] = set()

    def take(self, points: tuple[Point, ...]) -> None:
        self.points |= {(point.key, point.step, point.time_ms, point.value) for point in points}


@settings(max_examples=60)
@given(data=st.data())
def test_each_step_arrives_once_whatever_dies(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Attempts go back to earlier steps; the shipper dies before and after sending; the outbox is on disk."""
    path = tmp_path_factory.mktemp("run") / "outbox.sqlite"
    journal: list[Measured] = []
    kept_until: list[tuple[int, int]] = []  # (attempt, the last step of older attempts that it keeps)
    store = Store()

    def visible(found: Measured) -> bool:
        return all(found.attempt >= attempt or found.steps[0] <= step for attempt, step in kept_until)

    def ship(flights: int, dies: str) -> None:
        with begun(path) as outbox:
            for left in reversed(range(flights)):
                flight = outbox.flight()
                if flight is None:
                    rows = [found for found in journal if found.ids[0] > outbox.cursor and visible(found)]
                    flight = select(rows[:4], outbox.marks)
                    if flight is None:
                        return
                    if flight.points:
                        outbox.depart(flight)
                if left == 0 and dies == "before":
                    return
                store.take(flight.points)
                if left == 0 and dies == "after":
                    return
                outbox.arrived(flight)

    step = 0
    for attempt in range(1, data.draw(st.integers(2, 4)) + 1):
        if attempt > 1:
            step = data.draw(st.integers(0, step))
            kept_until.append((attempt, step))
        for _ in range(data.draw(st.integers(1, 6))):
            step += 1
            journal.append(row(8 * (len(journal) + 1), attempt, step))
            match data.draw(st.sampled_from(["nothing", "not", "before", "after", "after"])):
                case "nothing":
                    pass
                case dies:
                    ship(data.draw(st.integers(1, 3)), dies)
    ship(1000, "not")
    steps = sorted(step for _, step, _, _ in store.points)
    journaled = {found.steps[0] for found in journal if visible(found)}
    assert len(steps) == len(set(steps))
    assert journaled <= set(steps) <= {found.steps[0] for found in journal}


def test_a_flight_survives_exactly(tmp_path: Path) -> None:
    points = (
        Point("a", 1, 2, math.inf),
        Point("a", 2, 2, -0.0),
        Point("b", 3, 4, 0.1 + 0.2),
        Point("c", 1, 1, math.nan),
    )
    flight = Flight(17, points, {"a": Mark(2, 1, 2)})
    with begun(tmp_path / "outbox.sqlite") as outbox:
        outbox.depart(flight)
    with Outbox.open(tmp_path / "outbox.sqlite") as outbox:
        found = outbox.flight()
        assert repr(found) == repr(flight)
        assert found is not None
        outbox.arrived(found, refused=1)
        assert (outbox.cursor, outbox.flight(), outbox.marks) == (17, None, {"a": Mark(2, 1, 2)})
    with Outbox.open(tmp_path / "outbox.sqlite") as outbox:
        assert (outbox.cursor, outbox.view().points, outbox.marks) == (17, 3, {"a": Mark(2, 1, 2)})


def test_another_run_at_the_server_has_got_nothing_yet(tmp_path: Path) -> None:
    with begun(tmp_path / "outbox.sqlite") as outbox:
        outbox.arrived(Flight(17, (Point("a", 1, 2, 3.0),), {"a": Mark(1, -1, 1)}))
        outbox.tags_sent({"t": "1"})
        outbox.artifact_sent("x", 3)
        outbox.begin("here", "settings", REMOTE, 2)
        assert (outbox.cursor, outbox.sent_tags, outbox.artifacts) == (17, {"t": "1"}, {"x": 3})
        outbox.begin("here", "settings", Remote("r2", False, {"a": 9}, "", ""), 2)
        assert (outbox.cursor, outbox.sent_tags, outbox.artifacts) == (0, {}, {})
        assert outbox.marks == {"a": Mark(2, 9, 9)}
        assert outbox.remote_run_id == "r2"


def test_what_others_see(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    assert read_outbox(path) == NOTHING_SENT
    with begun(path) as outbox:
        outbox.artifact_sent("x", 3)
        outbox.artifact_sent("y", 4)
        outbox.artifact_removed("y")
        outbox.note(status="1:running", reports_sent=1)
        assert read_outbox(path) == outbox.view()
    assert read_outbox(path).artifacts == {"x": 3}
    assert read_outbox(path).command == "mlflow ui"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(OutboxError, match=r"outbox.sqlite: cannot read"):
        read_outbox(path)


def test_a_damaged_outbox_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    path.write_bytes(b"no database" * 100)
    with Outbox.open(path) as outbox:
        assert outbox.put_aside is not None
        assert outbox.put_aside.read_bytes().startswith(b"no database")
        assert outbox.remote_run_id is None
    with Outbox.open(path) as outbox:
        assert outbox.put_aside is None


def test_a_shipper_that_was_killed_while_it_wrote(tmp_path: Path) -> None:
    """Its half transaction is in the file by then, and nobody has rolled it back."""
    path = tmp_path / "outbox.sqlite"
    begun(path).close()
    before = read_outbox(path)
    code = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.executescript("PRAGMA cache_size = 1; BEGIN IMMEDIATE")
for number in range(2000):
    connection.execute("INSERT INTO tags VALUES (?, ?)", (f"key {number}", "value" * 100))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "outbox.sqlite-journal").stat().st_size, "the test kills too early or too late"
    assert read_outbox(path) == before


def test_a_newer_outbox_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    begun(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(OutboxError, match="format 99, expected 2"):
        Outbox.open(path)


def test_an_outage_is_told_once_and_pauses_grow() -> None:
    now, told, tries, up = 0.0, list[str](), list[float](), False

    def work(what: str) -> bool:
        tries.append(now)
        if not up:
            raise Unavailable(f"nobody takes {what}")
        return True

    line = Line("server", told.append, clock=lambda: now, chance=lambda: 0.0)
    for _ in range(4000):
        assert line.call(work, "this") is False
        now += 0.1
    pauses = [later - sooner for sooner, later in pairwise(tries)]
    assert pauses[:4] == pytest.approx([0.5, 1.0, 2.0, 4.0], abs=0.11)
    assert max(pauses) == pytest.approx(60, abs=0.11)
    assert told == ["server: nobody takes this; trying again until it works"]
    up = True
    line.hurry()
    assert line.call(work, "this") is True
    assert line.down_since is None
    assert told[1:] == ["server: works again after 400 s"]


@given(st.floats(0, 1, exclude_max=True))
def test_pauses_are_shortened_at_random(chance: float) -> None:
    def work(_: None) -> bool:
        raise Unavailable("no")

    line = Line("server", lambda text: None, clock=lambda: 0.0, chance=lambda: chance)
    line.call(work, None)
    assert line.pause_s == 0.5 * (1 - chance / 2)
