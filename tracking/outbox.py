"""The outbox: what the tracking server has got of a run, and what is on its way, in a file of the shipper's own.

Exactly once rests on three things kept here. The *cursor* is the id of the newest metric row that was dealt with.
A *flight* is written down before it is sent and struck out after: when nobody knows whether it arrived, the very
same points are sent again, and the store drops what it has (the journal may show other rows by then: those of a
resumed attempt, with other times). A *mark* for each key says which steps earlier attempts have delivered: a
resumed attempt goes through them again, and they are not sent again. *Windows* that are not complete (see
`tracking.thinning`) are kept with the cursor that they belong to.
"""

import contextlib
import json
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from states.errors import InterlockError
from tracking.delivery import Point, Remote
from tracking.forks import forget_in_children
from tracking.rows import TRAIN, Measured
from tracking.schema import Connection
from tracking.thinning import Window, Windows

__all__ = [
    "NOTHING_SENT",
    "Flight",
    "Mark",
    "Outbox",
    "OutboxError",
    "OutboxView",
    "close_windows",
    "metric_name",
    "read_outbox",
    "select",
]

FORMAT = 2

_TABLES = """
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (
    key TEXT PRIMARY KEY,
    attempt INTEGER NOT NULL,
    before INTEGER NOT NULL,  -- the highest step delivered by attempts before this one; -1: none
    highest INTEGER NOT NULL  -- the highest step delivered
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS flight (
    upto INTEGER NOT NULL, points TEXT NOT NULL, marks TEXT NOT NULL, windows TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE IF NOT EXISTS tags (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS artifacts (
    path TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, sent_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (path TEXT PRIMARY KEY, version TEXT NOT NULL) WITHOUT ROWID;
"""


class OutboxError(InterlockError):
    """The outbox cannot be read or written."""


@dataclass(frozen=True)
class Mark:
    """How far a key has got: steps up to `before` were delivered by attempts before `attempt`."""

    attempt: int
    before: int = -1
    highest: int = -1


@dataclass(frozen=True)
class Flight:
    """Points to be sent together. When they have arrived, the cursor is at `upto`, `marks` are true, and
    `windows` are those that are open.
    """

    upto: int
    points: tuple[Point, ...]
    marks: Mapping[str, Mark]
    windows: Mapping[str, Window] = field(default_factory=dict)


def metric_name(scope: str, batch: int, key: str) -> str:
    """How a journal's metric is called at the server: 'batch/loss', 'train/loss', 'val/loss'."""
    if scope == TRAIN:
        return f"{'batch' if batch >= 0 else 'train'}/{key}"
    return f"{scope.removeprefix('validation/')}/{key}"


def select(
    rows: Iterable[Measured],
    marks: Mapping[str, Mark],
    key: Callable[[str], str] = str,
    windows: Mapping[str, Window] | None = None,
    every: int = 1,
) -> Flight | None:
    """What is to be sent of the journal's next rows: all but steps that earlier attempts delivered.

    `key` gives the name under which a metric is shown. Values of batches go into `windows`, which end at multiples
    of `every` batches. None if there are no rows. A flight without points still moves the cursor.
    """
    upto = 0
    points: list[Point] = []
    changed: dict[str, Mark] = {}
    thinned = Windows(windows or {}, every)
    for found in rows:
        upto = found.last
        times_ms = [time_ns // 1_000_000 for time_ns in found.times_ns]
        highest = max(found.steps)
        for own, column in zip(found.keys, found.columns, strict=True):
            name = key(metric_name(found.scope, found.batches[0], own))
            mark = changed.get(name) or marks.get(name) or Mark(found.attempt)
            if found.attempt > mark.attempt:
                mark = Mark(found.attempt, mark.highest, mark.highest)
            changed[name] = replace(mark, highest=max(mark.highest, highest))
            values = sorted(zip(found.steps, times_ms, column, strict=True))
            values = values[bisect_right(values, mark.before, key=itemgetter(0)) :]
            if found.scope == TRAIN and found.batches[0] >= 0:
                points += _means(thinned.add(name, values))
            else:
                points += (Point(name, *one) for one in values)
        points += _means(thinned.passed(highest))
    return Flight(upto, tuple(points), changed, thinned.open) if upto else None


def close_windows(upto: int, windows: Mapping[str, Window]) -> Flight | None:
    """What is to be sent when nothing follows that would complete `windows`; None if there are none."""
    return Flight(upto, tuple(_means(windows.items())), {}) if windows else None


def _means(windows: Iterable[tuple[str, Window]]) -> Iterator[Point]:
    return (Point(name, window.step, window.time_ms, window.mean) for name, window in windows)


@dataclass(frozen=True)
class OutboxView:
    """What an outbox says to someone who looks on.

    `points` were delivered; `cursor` is the newest metric row that was dealt with; `windows` are those points that
    are not complete; `reports_sent` the newest attempt whose end is in the uploaded reports; `trouble` why delivery
    does not go on, or was given up; `versions` which of the user's own artifacts are there, by their paths.
    """

    place: str = ""
    remote_run_id: str | None = None
    url: str = ""
    command: str = ""
    cursor: int = 0
    windows: int = 0
    points: int = 0
    status: str = ""
    reports_sent: int = 0
    trouble: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


NOTHING_SENT = OutboxView()


class Outbox:
    """The shipper's memory of one run. Written by the holder of the outbox's lease only, in one thread."""

    def __init__(self, connection: sqlite3.Connection, path: Path, put_aside: Path | None = None):
        self._connection = connection
        self.path = path
        self.put_aside = put_aside
        """Where a damaged outbox went that was found in this one's place."""
        self.marks = {
            row[0]: Mark(*row[1:]) for row in self._all("SELECT key, attempt, before, highest FROM marks")
        }
        self.sent_tags: dict[str, str] = dict(self._all("SELECT key, value FROM tags"))
        self.artifacts: dict[str, int] = dict(self._all("SELECT path, size_bytes FROM artifacts"))
        self.versions: dict[str, str] = dict(self._all("SELECT path, version FROM versions"))
        self.windows = _windows(self._get("windows", "{}"))

    @classmethod
    def open(cls, path: Path) -> "Outbox":
        """Open it, or make it. One that is damaged is put aside: the server is then asked what it has.

        Raises OutboxError if it cannot be written, or a newer interlock wrote it.
        """
        try:
            try:
                return cls(_connect(path), path)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(aside)
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                return cls(_connect(path), path, aside)
        except (sqlite3.Error, OSError) as error:
            raise OutboxError(
                f"{path}: cannot open the outbox ({error}); is the run's folder writable?"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def place(self) -> str:
        """Where everything in here was sent."""
        return str(self._get("place", ""))

    @property
    def remote_run_id(self) -> str | None:
        """The server's own id of the run; None while it is not known."""
        found = self._get("remote_run_id", None)
        return None if found is None else str(found)

    @property
    def cursor(self) -> int:
        """The id of the newest metric row that was dealt with."""
        return int(self._get("cursor", 0))

    @property
    def status(self) -> str:
        """The status that the server was told last, with its attempt; '' for none."""
        return str(self._get("status", ""))

    @property
    def params_sent(self) -> int:
        """The newest attempt whose parameters were sent."""
        return int(self._get("params_sent", 0))

    @property
    def reports_sent(self) -> int:
        """The newest attempt that had ended when the reports were uploaded."""
        return int(self._get("reports_sent", 0))

    @property
    def target(self) -> str:
        """The settings that were used last, as text."""
        return str(self._get("target", ""))

    def view(self) -> OutboxView:
        """All that it says."""
        return _view(self._connection)

    def begin(self, place: str, target: str, remote: Remote, newest_attempt: int) -> None:
        """Note which remote run this is. Where it is another than before, nothing has been sent.

        What the server has of a run that we know nothing of becomes the marks: `remote.steps` are taken for
        rows of `newest_attempt` and before.
        """
        with self._transaction():
            if (place, remote.run_id) != (self.place, self.remote_run_id):
                for table in ("state", "marks", "flight", "tags", "artifacts", "versions"):
                    self._connection.execute(f"DELETE FROM {table}")
                self.marks, self.sent_tags, self.artifacts, self.versions, self.windows = {}, {}, {}, {}, {}
                self._keep_marks(
                    {key: Mark(newest_attempt, step, step) for key, step in remote.steps.items()}
                )
            self._set(place=place, target=target, remote_run_id=remote.run_id)
            self._set(url=remote.url, command=remote.command, trouble="")

    def flight(self) -> Flight | None:
        """The flight of which nobody knows whether it arrived."""
        rows = self._all("SELECT upto, points, marks, windows FROM flight")
        if not rows:
            return None
        upto, points, marks, windows = rows[0]
        return Flight(
            upto,
            tuple(Point(*values) for values in json.loads(points)),
            {key: Mark(*values) for key, values in json.loads(marks).items()},
            _windows(windows),
        )

    def depart(self, flight: Flight) -> None:
        """Write down what is about to be sent."""
        points = [[point.key, point.step, point.time_ms, point.value] for point in flight.points]
        marks = {key: [mark.attempt, mark.before, mark.highest] for key, mark in flight.marks.items()}
        with self._transaction():
            self._connection.execute(
                "INSERT INTO flight VALUES (?, ?, ?, ?)",
                (flight.upto, json.dumps(points), json.dumps(marks), _text(flight.windows)),
            )

    def arrived(self, flight: Flight, refused: int = 0) -> None:
        """Strike the flight out: all of it has been dealt with, `refused` of its points in vain."""
        with self._transaction():
            self._connection.execute("DELETE FROM flight")
            self._keep_marks(flight.marks)
            sent = int(self._get("points", 0)) + len(flight.points) - refused
            self._set(cursor=flight.upto, points=sent, windows=_text(flight.windows))
        self.windows = dict(flight.windows)

    def tags_sent(self, values: Mapping[str, str]) -> None:
        """Remember tags as the server has them now."""
        with self._transaction():
            self._connection.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?)", values.items())
        self.sent_tags.update(values)

    def artifact_sent(self, path: str, size_bytes: int, version: str = "") -> None:
        """Remember that the server has all of `path` (a file, or a folder with all that is in it).

        `version` is that of an artifact of the user's own.
        """
        with self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?)", (path, size_bytes, time.time_ns())
            )
            if version:
                self._connection.execute("INSERT OR REPLACE INTO versions VALUES (?, ?)", (path, version))
        self.artifacts[path] = size_bytes
        if version:
            self.versions[path] = version

    def artifact_removed(self, path: str) -> None:
        """Forget an artifact that the server does not have any more."""
        with self._transaction():
            self._connection.execute("DELETE FROM artifacts WHERE path = ?", (path,))
        self.artifacts.pop(path, None)

    def note(self, **values: str | int) -> None:
        """Remember `status`, `params_sent`, `reports_sent` or `trouble`."""
        with self._transaction():
            self._set(**values)

    def _keep_marks(self, marks: Mapping[str, Mark]) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)",
            [(key, mark.attempt, mark.before, mark.highest) for key, mark in marks.items()],
        )
        self.marks.update(marks)

    def _get(self, key: str, default: Any) -> Any:
        rows = self._all("SELECT value FROM state WHERE key = ?", key)
        return rows[0][0] if rows else default

    def _set(self, **values: str | int) -> None:
        self._connection.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", values.items())

    def _all(self, sql: str, *arguments: object) -> list[Any]:
        return self._connection.execute(sql, arguments).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise OutboxError(
                    f"{self.path}: cannot write the outbox ({error}); is the disk full?"
                ) from error
            raise


def read_outbox(path: Path) -> OutboxView:
    """What was delivered, as far as the outbox knows; NOTHING_SENT if there is none.

    Raises OutboxError if it cannot be read.
    """
    if not path.exists():
        return NOTHING_SENT
    try:
        try:
            return _read(path, "ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            return _read(path, "rw")  # a shipper was killed in mid-transaction: it is rolled back first
    except sqlite3.Error as error:
        raise OutboxError(f"{path}: cannot read the outbox ({error}); the shipper makes a new one") from error


def _read(path: Path, mode: str) -> OutboxView:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=5, factory=Connection
    )
    try:
        connection.file = path.resolve()
        forget_in_children(connection)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "artifacts" not in tables:
            return NOTHING_SENT
        connection.execute("BEGIN")
        return _view(connection, versions="versions" in tables)
    finally:
        connection.close()


def _text(windows: Mapping[str, Window]) -> str:
    return json.dumps({key: list(w) for key, w in windows.items()})


def _windows(text: str) -> dict[str, Window]:
    return {key: Window(*values) for key, values in json.loads(text).items()}


def _view(connection: sqlite3.Connection, *, versions: bool = True) -> OutboxView:
    """`versions`: whether there is that table, which an older interlock did not make."""
    state = dict(connection.execute("SELECT key, value FROM state"))
    return OutboxView(
        place=state.get("place", ""),
        remote_run_id=state.get("remote_run_id"),
        url=state.get("url", ""),
        command=state.get("command", ""),
        cursor=state.get("cursor", 0),
        windows=len(_windows(state.get("windows", "{}"))),
        points=state.get("points", 0),
        status=state.get("status", ""),
        reports_sent=state.get("reports_sent", 0),
        trouble=state.get("trouble", ""),
        tags=dict(connection.execute("SELECT key, value FROM tags")),
        artifacts=dict(connection.execute("SELECT path, size_bytes FROM artifacts")),
        versions=dict(connection.execute("SELECT path, version FROM versions")) if versions else {},
    )


def _connect(path: Path) -> sqlite3.Connection:
    # A rollback journal: there is one writer, which is not in a hurry, and no file beside it to be left behind.
    connection = sqlite3.connect(path, isolation_level=None, timeout=20)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = FULL")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found > FORMAT:
            raise OutboxError(
                f"{path}: found outbox format {found}, expected {FORMAT}; use a newer interlock"
            )
        older = "ALTER TABLE flight ADD COLUMN windows TEXT NOT NULL DEFAULT '{}';" if found == 1 else ""
        connection.executescript(
            f"BEGIN IMMEDIATE; {_TABLES} {older} PRAGMA user_version = {FORMAT}; COMMIT;"
        )
    except BaseException:
        connection.close()
        raise
    return connection
