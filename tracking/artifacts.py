"""What a run leaves to look at: files made from its journal, by a process of their own.

`REPORTS` lists them. The process is `python -m tracking.artifacts RUN_FOLDER INTO`: the shipper starts it, goes on
delivering meanwhile, and uploads what it finds there afterwards. It may fail, or be killed, without harm.
"""

import csv
import gzip
import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.journal import Journal
from tracking.journal_copy import JOURNAL, write_journal_copy
from tracking.masking import mask_text, secrets_in
from tracking.one_off import go_with_parent
from tracking.rows import Transition
from tracking.runs import RunFolder

if TYPE_CHECKING:
    from tracking.tally import Tally

__all__ = [
    "METRICS",
    "REPORTS",
    "TRANSITIONS",
    "Subject",
    "make_reports",
    "write_metrics",
    "write_transitions",
]

TRANSITIONS = "transitions.jsonl.gz"
"""The name of the log of transitions."""

METRICS = "metrics.csv.gz"
"""The name of the table of all metric values, those of every batch."""

_METRIC_COLUMNS = ("attempt", "scope", "epoch", "batch", "step", "key", "value", "time_ns")


class Subject:
    """The run that is reported on, and what several reports need of it."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.secrets = secrets_in(os.environ)

    def hide(self, text: str) -> str:
        """The text without secrets."""
        return mask_text(text, self.secrets)

    @cached_property
    def tally(self) -> "Tally":
        """Its time, added up."""
        from tracking.tally import tally

        return tally(self.run)


# What makes them is imported when they are made: most who import this module want their names.


def _transitions(subject: Subject, file: Path) -> None:
    with Journal.open(subject.run) as journal:
        write_transitions(journal, file, subject.secrets)


def _metrics(subject: Subject, file: Path) -> None:
    with Journal.open(subject.run) as journal:
        write_metrics(journal, file)


def _journal(subject: Subject, file: Path) -> None:
    write_journal_copy(subject.run, file, subject.secrets)


def _timeline(subject: Subject, file: Path) -> None:
    from tracking.timeline import write_timeline

    write_timeline(subject.run, file, subject.tally, subject.hide)


def _machine(subject: Subject, file: Path) -> None:
    from states.diagram import svg
    from states.table import TRAINING

    file.write_text(svg(TRAINING, *subject.tally.of_training()), encoding="utf-8")


def _curves(subject: Subject, file: Path) -> None:
    from tracking.curves import write_curves

    write_curves(subject.run, file)


REPORTS: Mapping[str, Callable[[Subject, Path], None]] = {
    TRANSITIONS: _transitions,
    METRICS: _metrics,
    JOURNAL: _journal,
    "timeline.html": _timeline,
    "machine.svg": _machine,
    "curves.png": _curves,
}
"""The reports by the names that they have at the server, each with what writes it into a file."""


def make_reports(run: RunFolder, folder: Path) -> dict[str, str]:
    """Write all reports of `run` into `folder`, each whole or not at all; why some are missing, by their names."""
    subject, failures = Subject(run), {}
    for name, write in REPORTS.items():
        draft = folder / f".{name}"
        try:
            write(subject, draft)
            draft.replace(folder / name)
        except Exception as error:  # whatever it is, the others are made
            failures[name] = f"{type(error).__name__}: {error}"
    return failures


def write_transitions(journal: Journal, file: Path, secrets: Collection[str] = ()) -> int:
    """Write the run's transitions, superseded ones left out, as gzipped lines of JSON; how many there are.

    The fields are the columns of the journal's view `transitions`. JSON has no NaN and no infinity: such a loss
    is the text 'nan', 'inf' or '-inf'. Notes are masked (`secrets` wherever they stand). The same journal gives the
    same bytes.
    """
    count = 0
    with file.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        for transition in journal.transitions():
            packed.write(json.dumps(_fields(transition, secrets), separators=(",", ":")).encode() + b"\n")
            count += 1
    return count


def write_metrics(journal: Journal, file: Path) -> int:
    """Write all the run's metric values, superseded ones left out, as a gzipped CSV table; how many there are.

    The columns are those of the journal's view `metrics`. Values are written so that reading gives the very same
    ones, 'nan', 'inf' and '-inf' included. The same journal gives the same bytes.
    """
    count = 0
    with (
        file.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_METRIC_COLUMNS)
        values = attrgetter(*_METRIC_COLUMNS)
        for metric in journal.metrics():
            table.writerow(values(metric))
            count += 1
    return count


def _fields(row: Transition, secrets: Collection[str]) -> dict[str, object]:
    loss = row.loss if row.loss is None or math.isfinite(row.loss) else str(row.loss)
    return {
        "seq": row.seq,
        "attempt": row.attempt,
        "scope": row.scope,
        "epoch": row.epoch,
        "batch": row.batch,
        "phase": row.phase,
        "trigger": row.trigger.value,
        "source": row.source.value,
        "dest": row.dest.value,
        "time_ns": row.time_ns,
        "duration_ns": row.duration_ns,
        "loss": loss,
        "note": mask_text(row.note, secrets) if row.note else "",
    }


def main(arguments: list[str]) -> None:
    """`python -m tracking.artifacts RUN_FOLDER INTO`; prints a line of JSON: the names of what failed, and why."""
    go_with_parent()
    run, folder = map(Path, arguments)
    print(json.dumps(make_reports(RunFolder(run), folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
