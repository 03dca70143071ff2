"""The journal as an artifact: a compressed copy without secrets, and the making of a journal from it."""

import gzip
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tracking.masking import mask_text, mask_tree
from tracking.packed import NEWEST_SEQ
from tracking.runs import RunFolder
from tracking.schema import FORMAT, JournalError, check_format, connect_to_read, without_blocks

__all__ = ["JOURNAL", "forget_checkpoints", "journal_from_copy", "write_journal_copy"]

JOURNAL = "journal.sqlite.gz"
"""The name of the copy."""

_JSON = {"attempts": ("command", "params")}
_TEXT = {
    "attempts": ("reason", "exception"),
    "logs": ("message",),
    "packed_transitions": ("note",),
}
_LEVEL = 1  # mostly numbers: trying harder makes it a tenth smaller, and takes five times as long


def write_journal_copy(run: RunFolder, file: Path, secrets: Iterable[str] = ()) -> int:
    """Write a gzipped copy of the run's journal as it stands; the seq of the newest transition that is in it.

    Command lines, parameters, notes and messages are masked (`secrets` are hidden wherever they stand). Takes one
    read transaction. Raises JournalError.
    """
    plain = file.with_suffix(".draft")
    plain.unlink(missing_ok=True)
    try:
        with closing(connect_to_read(run.journal)) as journal:
            journal.execute("VACUUM INTO ?", (str(plain),))
        newest = _mask(plain, frozenset(secrets))
        with (
            plain.open("rb") as source,
            file.open("wb") as target,
            gzip.GzipFile("", "wb", _LEVEL, target, mtime=0) as packed,
        ):
            shutil.copyfileobj(source, packed, 1 << 20)
    except sqlite3.Error as error:
        raise JournalError(f"{run.journal}: cannot be copied ({error}); is the disk full?") from error
    finally:
        plain.unlink(missing_ok=True)
    return newest


def _mask(copy: Path, secrets: Collection[str]) -> int:
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        if check_format(connection, copy) < FORMAT:
            without_blocks(connection)
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA secure_delete = ON")  # what was written over is not left in the file
        connection.create_function("masked", 1, _of(lambda text: mask_text(text, secrets)))
        connection.create_function(
            "masked_json", 1, _of(lambda text: json.dumps(mask_tree(json.loads(text), secrets)))
        )
        connection.execute("BEGIN")
        for tables, function in ((_JSON, "masked_json"), (_TEXT, "masked")):
            for table, columns in tables.items():
                for column in columns:
                    connection.execute(
                        f"UPDATE {table} SET {column} = {function}({column}) "
                        f"WHERE {column} IS NOT NULL AND {column} != '' AND {column} != {function}({column})"
                    )
        connection.execute("COMMIT")
        return int(connection.execute(NEWEST_SEQ).fetchone()[0])


def _of(function: Callable[[str], str]) -> Callable[[Any], Any]:
    return lambda value: function(value) if isinstance(value, str) else value


def journal_from_copy(copy: Path, journal: Path) -> None:
    """Make a journal of a copy. Raises JournalError if it is damaged."""
    try:
        with gzip.open(copy, "rb") as source, journal.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        with closing(sqlite3.connect(journal)) as connection:
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
    except (OSError, EOFError, sqlite3.Error) as error:
        raise JournalError(f"{copy.name}: is damaged ({error}); expected a copy of a journal") from error
    if found != "ok":
        raise JournalError(f"{copy.name}: is damaged ({found}); expected a copy of a journal")


def forget_checkpoints(journal: Path, here: Collection[str]) -> None:
    """Write down that no checkpoint is there but those named `here`."""
    with closing(sqlite3.connect(journal)) as connection, connection:
        marks = ", ".join("?" * len(here))
        connection.execute(
            f"UPDATE checkpoints SET removed_ns = ? WHERE removed_ns IS NULL AND name NOT IN ({marks})",
            (time.time_ns(), *here),
        )
        connection.execute(f"UPDATE checkpoints SET removed_ns = NULL WHERE name IN ({marks})", tuple(here))
