"""What a run leaves to look at: files made from its journal."""

import csv
import gzip
import io
import json
import math
from collections.abc import Collection
from operator import attrgetter
from pathlib import Path

from tracking.journal import Journal
from tracking.masking import mask_text
from tracking.rows import Transition

__all__ = ["METRICS", "TRANSITIONS", "write_metrics", "write_transitions"]

TRANSITIONS = "transitions.jsonl.gz"
"""The name of the log of transitions."""

METRICS = "metrics.csv.gz"
"""The name of the table of all metric values, those of every batch."""

_METRIC_COLUMNS = ("attempt", "scope", "epoch", "batch", "step", "key", "value", "time_ns")


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
