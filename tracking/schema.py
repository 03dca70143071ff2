"""The tables and views of a run's journal file, and how its connections are opened.

Transitions and metrics are packed. A row of `packed_transitions` holds up to 8 consecutive transitions of
one (attempt, scope, epoch, batch); which ones they were is a pattern, a *word*, stored once in `words`. A
row of `packed_metrics` holds up to 8 values; which ones is a *keyset*. Where many come at once, up to 64 such rows
are one row of `transition_blocks` or `metric_blocks` (`tracking.packed`). The views unpack them: they are for
readers with any tool that reads SQLite.

A NaN cannot be stored in SQLite (it becomes NULL), so it is stored as the text 'nan'. NULL is "no value".
Values have columns without a type, so that SQLite gives back the very number (-0.0 included).
"""

import contextlib
import os
import re
import sqlite3
import sys
from ctypes import py_object, pythonapi
from pathlib import Path
from typing import Any

from states.errors import InterlockError
from tracking.forks import forget_in_children
from tracking.packed import ordinals, unpacked_metrics, unpacked_transitions
from tracking.rows import Parent

__all__ = [
    "FORMAT",
    "Connection",
    "JournalDamagedError",
    "JournalError",
    "JournalFormatError",
    "check_format",
    "connect_to_read",
    "connect_to_write",
    "create_journal",
    "explained",
    "filesystem_type",
    "is_local",
    "newest_checkpoint",
    "without_blocks",
]

FORMAT = 3
"""Version of the tables and views below, stored in `run` under 'format'.

In format 1 each transition of a row had a time of its own (t1 to t7), and before format 3 there were no blocks. What
was written so is read as it is.
"""

_TRANSITION_COLUMNS = (
    "seq, attempt, scope, epoch, batch, phase, trigger, source, dest, time_ns, duration_ns, loss, note"
)
_METRIC_COLUMNS = "id, attempt, scope, epoch, batch, step, key, value, time_ns"

_VIEWS = f"""
CREATE VIEW all_transitions AS {unpacked_transitions()} ORDER BY 1;
CREATE VIEW transitions AS SELECT {_TRANSITION_COLUMNS} FROM all_transitions WHERE NOT superseded;
CREATE VIEW all_metrics AS {unpacked_metrics()} ORDER BY 1;
CREATE VIEW metrics AS SELECT {_METRIC_COLUMNS} FROM all_metrics WHERE NOT superseded;
"""

_BLOCKS = """
CREATE {temporary}TABLE transition_blocks (
    seq INTEGER PRIMARY KEY, -- of the first transition
    last INTEGER NOT NULL,   -- seq of the last one
    rows INTEGER NOT NULL,   -- packed rows; each has `record` digits of `data`
    attempt INTEGER NOT NULL, scope INTEGER NOT NULL, epoch INTEGER NOT NULL,
    batch INTEGER NOT NULL, time_ns INTEGER NOT NULL, -- of the first row
    length INTEGER NOT NULL, -- durations of a row
    lead INTEGER NOT NULL, width INTEGER NOT NULL, record INTEGER NOT NULL, -- digits: see docs/formats.md
    data BLOB NOT NULL
);
CREATE {temporary}TABLE metric_blocks (
    id INTEGER PRIMARY KEY,  -- of the first row; the others' follow
    rows INTEGER NOT NULL, attempt INTEGER NOT NULL, scope INTEGER NOT NULL, epoch INTEGER NOT NULL,
    seq INTEGER NOT NULL, batch INTEGER NOT NULL, step INTEGER NOT NULL, time_ns INTEGER NOT NULL, -- of the first row
    length INTEGER NOT NULL, -- values of a row
    lead INTEGER NOT NULL, span INTEGER NOT NULL, record INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE {temporary}TABLE ordinals (n INTEGER PRIMARY KEY, two REAL NOT NULL, power REAL NOT NULL);
"""
_ORDINALS = "INSERT INTO ordinals VALUES (?, ?, ?)"

_TABLES = f"""
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY,
    position INTEGER,        -- seq of the transition that this attempt goes back to; NULL for the first
    first_seq INTEGER NOT NULL,
    started_ns INTEGER NOT NULL,
    ended_ns INTEGER,
    pid INTEGER NOT NULL,
    host TEXT NOT NULL,
    process_started REAL NOT NULL,
    end_state TEXT,
    outcome TEXT,            -- NULL while running; 'done', 'failed', 'stopped', 'died'
    reason TEXT,
    exception TEXT,
    command TEXT NOT NULL,   -- JSON, like the next two
    params TEXT NOT NULL,
    versions TEXT NOT NULL,
    device TEXT NOT NULL,
    kept_until INTEGER       -- rows of this attempt with a greater seq are superseded; NULL: none is
);

CREATE TABLE scopes (scope INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

CREATE TABLE words (
    word INTEGER, pos INTEGER,
    trigger TEXT NOT NULL, source TEXT NOT NULL, dest TEXT NOT NULL, phase TEXT NOT NULL,
    loss INTEGER NOT NULL,   -- 1: the packed row's loss is this transition's
    last INTEGER NOT NULL,   -- 1: the packed row's note is this transition's
    PRIMARY KEY (word, pos)
) WITHOUT ROWID;

CREATE TABLE packed_transitions (
    seq INTEGER PRIMARY KEY, -- of the first; the others follow without a gap
    attempt INTEGER NOT NULL, scope INTEGER NOT NULL, word INTEGER NOT NULL,
    epoch INTEGER NOT NULL, batch INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, -- of the first; t1 to t7 are the others' distances from it; NULL: the sum of d1 to it
    {", ".join(f"t{pos} INTEGER" for pos in range(1, 8))},
    {", ".join(f"d{pos} INTEGER" for pos in range(8))},
    loss, note TEXT
);

CREATE TABLE keysets (
    keyset INTEGER, pos INTEGER, key TEXT NOT NULL, PRIMARY KEY (keyset, pos)
) WITHOUT ROWID;

CREATE TABLE packed_metrics (
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL,
    seq INTEGER NOT NULL,    -- of the transition whose work measured them
    scope INTEGER NOT NULL,
    epoch INTEGER NOT NULL, batch INTEGER NOT NULL, -- batch -1: metrics of the epoch
    step INTEGER NOT NULL, keyset INTEGER NOT NULL, time_ns INTEGER NOT NULL,
    {", ".join(f"v{pos}" for pos in range(8))}
);

CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, attempt INTEGER NOT NULL, seq INTEGER NOT NULL,
    epoch INTEGER NOT NULL, batch INTEGER NOT NULL, state TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, duration_ns INTEGER NOT NULL,
    best INTEGER NOT NULL,   -- 1: was the best so far when it was made
    metrics TEXT NOT NULL,   -- JSON
    removed_ns INTEGER       -- when retention removed it; NULL: it is there
);

CREATE TABLE logs (
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, time_ns INTEGER NOT NULL, level TEXT NOT NULL,
    message TEXT NOT NULL
);

{_BLOCKS.format(temporary="")}
{_VIEWS}
"""

_MIGRATION = f"""
BEGIN IMMEDIATE;
DROP VIEW transitions; DROP VIEW all_transitions; DROP VIEW metrics; DROP VIEW all_metrics;
{_BLOCKS.format(temporary="")}
{_VIEWS}
UPDATE run SET value = '{FORMAT}' WHERE key = 'format';
"""
"""From formats 1 and 2; the numbers of `ordinals`, and then the commit, are for who runs it."""


class JournalError(InterlockError):
    """The journal cannot be read, or cannot be written."""


class JournalDamagedError(JournalError):
    """A file that should be a journal is not one, or is beyond SQLite's repair."""


class JournalFormatError(JournalError):
    """The journal was written by a newer interlock."""


class Connection(sqlite3.Connection):
    """An SQLite connection that forked children let go of without using it.

    SQLite keeps descriptors and locks for the process that opened the file; in a child its library state is
    a lie. So the child closes the descriptors with plain `close(2)` (POSIX locks belong to the process, the
    parent's stay), keeps the object alive for ever (collecting it would call `sqlite3_close`, which
    might truncate the parent's WAL), and refuses to open the same file again.
    """

    file: Path
    forgotten = False

    def forget(self) -> None:
        """In a forked child: close the descriptors behind SQLite's back, and never use them."""
        self.forgotten = True
        pythonapi.Py_IncRef(py_object(self))
        _not_ours.add(self.file)
        _close_descriptors(self.file)

    def check_ours(self) -> None:
        """Raise JournalError in a forked child."""
        if self.forgotten:
            raise _not_here(self.file)

    def close(self) -> None:
        """Close, unless this is a forked child's copy."""
        if not self.forgotten:
            super().close()

    if (3, 12) <= sys.version_info < (3, 12, 4):

        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            """As ever. These releases of Python take ?1 for a placeholder with a name, and warn of values without."""
            if "?1" in sql and isinstance(parameters, tuple):
                values = {str(number): value for number, value in enumerate(parameters, 1)}
                return super().execute(_NUMBERED.sub(r":\1", sql), values)
            return super().execute(sql, parameters)


_NUMBERED = re.compile(r"\?(\d)")
_not_ours: set[Path] = set()


def _close_descriptors(file: Path) -> None:
    names = {str(file) + ending for ending in ("", "-wal", "-shm", "-journal")}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)") in names:
                os.close(int(number))


def create_journal(
    path: Path, *, run_id: str, name: str, created_ns: int, parent: Parent | None = None
) -> None:
    """Make the empty journal of a new run; it is complete in one file when this returns.

    Raises JournalError if it cannot be written.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        _choose_mode(connection, path)
        identity = {"id": run_id, "name": name, "created_ns": str(created_ns), "format": str(FORMAT)}
        if parent is not None:
            told = {f"parent_{key}": value for key, value in vars(parent).items() if value is not None}
            identity |= {key: str(value) for key, value in told.items()}
        connection.executescript("BEGIN IMMEDIATE;" + _TABLES)
        connection.executemany(_ORDINALS, ordinals())
        connection.executemany("INSERT INTO run VALUES (?, ?)", identity.items())
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise JournalError(f"{path}: cannot create the journal ({error})") from error
    finally:
        connection.close()


def connect_to_write(path: Path, *, busy_s: float = 1.0) -> tuple[Connection, str]:
    """The connection of the one writer, and a notice to show the user ('' if there is nothing to say).

    Commits wait for the disk (synchronous=FULL). Raises JournalError (see `connect_to_read`).
    """
    connection = _connect(path, "mode=rw", busy_s)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        notice = _choose_mode(connection, path)
        if check_format(connection, path) < FORMAT:
            connection.executescript(_MIGRATION)
            connection.executemany(_ORDINALS, ordinals())
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        connection.close()
        raise explained(path, error) from error
    except JournalError:
        connection.close()
        raise
    return connection, notice


def connect_to_read(path: Path, *, busy_s: float = 5.0) -> Connection:
    """A connection that cannot write; usable while another process writes.

    Where neither the folder can be written nor a writer is alive, the file is read as it stands. Tables that an older
    format has not are there, empty, as temporary ones.
    Raises JournalError if there is no journal, JournalDamagedError if it is none, JournalFormatError if
    it is of a newer format.
    """
    connection = _connect(path, "mode=ro", busy_s)
    try:
        try:
            found = check_format(connection, path)
        except sqlite3.OperationalError:
            # A file in WAL mode needs its -shm file, which cannot be made in a folder that is read-only.
            # With no WAL to replay the main file is all there is, and nobody can be writing to it.
            if os.access(path.parent, os.W_OK) or _size(Path(f"{path}-wal")):
                raise
            connection.close()
            connection = _connect(path, "mode=ro&immutable=1", busy_s)
            found = check_format(connection, path)
        if found < FORMAT:
            without_blocks(connection)
    except sqlite3.Error as error:
        connection.close()
        raise explained(path, error) from error
    except JournalError:
        connection.close()
        raise
    return connection


def without_blocks(connection: sqlite3.Connection) -> None:
    """Let a journal of an older format, which has no blocks, be read as one that has none."""
    connection.executescript(_BLOCKS.format(temporary="TEMP "))


def _connect(path: Path, options: str, busy_s: float) -> Connection:
    path = path.resolve()
    if path in _not_ours:
        raise _not_here(path)
    if not path.is_file():
        raise JournalError(_missing(path))
    try:
        connection = sqlite3.connect(
            f"{path.as_uri()}?{options}",
            uri=True,
            timeout=busy_s,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
    except sqlite3.Error as error:
        raise explained(path, error) from error
    connection.file = path
    forget_in_children(connection)
    return connection


def _missing(path: Path) -> str:
    folder, checkpoint = path.parent, newest_checkpoint(path.parent)
    if checkpoint is None:
        return f"{path}: there is no journal here; a run's folder has a {path.name}"
    tracked = (folder / "tracker.json").is_file()
    fetched = 'fit(resume="mlflow:RUN_ID") fetches the run with its journal, and ' if tracked else ""
    return (
        f"{folder}: found checkpoints, but no {path.name}; expected both: without its journal a run can be neither "
        f"gone on with nor shown. Put a copy of {path.name} back. Or move the folder out of {folder.parent}: then "
        f"{fetched}"
        f'a new run can take the weights, Trainer(init_from=".../checkpoints/{checkpoint.name}")'
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder by its name, for when no journal tells more."""
    whole = [manifest.parent for manifest in folder.glob("checkpoints/*/manifest.json")]
    return max(whole, key=lambda checkpoint: checkpoint.name, default=None)


def _not_here(path: Path) -> JournalError:
    return JournalError(
        f"{path}: this process was forked from one that had this journal open, where SQLite cannot be used; "
        "read it from a process that was spawned"
    )


def check_format(connection: sqlite3.Connection, path: Path) -> int:
    """The format of the journal in `path`. Raises JournalFormatError where a newer interlock wrote it."""
    row = connection.execute("SELECT value FROM run WHERE key = 'format'").fetchone()
    found = row[0] if row else "none"
    if found not in map(str, range(1, FORMAT + 1)):
        raise JournalFormatError(
            f"{path}: found journal format {found}, expected {FORMAT}; read it with a newer interlock"
        )
    return int(found)


def explained(path: Path, error: sqlite3.Error) -> JournalError:
    """What an error of SQLite's means for the journal at `path`."""
    text = str(error)
    if "no such table" in text or (
        isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    ):
        return JournalDamagedError(
            f"{path}: found a file that is no journal, or a damaged one ({text}); "
            "put back a copy of it, or begin a new run of another name"
        )
    return JournalError(
        f"{path}: cannot open the journal ({text}); is the folder readable, and the disk not full?"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _choose_mode(connection: sqlite3.Connection, path: Path) -> str:
    """WAL where its shared memory works, else a rollback journal; what to tell the user."""
    kind = filesystem_type(path.resolve())
    wanted = "wal" if is_local(kind) else "delete"
    found = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
    if wanted == "wal" and found == "wal":
        return ""
    return (
        f"{path}: on a file system of type {kind!r} the journal is kept with journal_mode={found}: "
        "readers may hold the writer up for a moment"
    )


_REMOTE = {
    *("9p", "afs", "afpfs", "beegfs", "ceph", "cifs", "coda", "gfs", "gfs2", "glusterfs", "gpfs", "lustre"),
    *("ncpfs", "nfs", "nfs4", "ocfs2", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs"),
}


def is_local(kind: str) -> bool:
    """Do processes on one machine see each other's mapped memory and locks on a file system of this type?

    Not known of those that other machines write to, nor of any in user space (FUSE).
    """
    return kind not in _REMOTE and not kind.startswith("fuse")


def filesystem_type(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds `path` ('ext4', 'nfs4', 'fuse.sshfs'); '' if it is not known.

    `mounts` is the text of a Linux mountinfo file; default: this process's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:
            return ""
    best, found = -1, ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4].encode().decode("unicode_escape") if rest else "\0"
        # The last of equal mount points is the one mounted on top.
        if path.is_relative_to(point) and len(point) >= best:
            best, found = len(point), rest.split(" ")[0]
    return found
