"""What a run leaves to look at: files made from its journal. For now the log of its transitions."""

import gzip
import json
import math
from collections.abc import Collection
from pathlib import Path

from tracking.journal import Journal
from tracking.masking import mask_text
from tracking.rows import Transition

__all__ = ["TRANSITIONS", "write_transitions"]

TRANSITIONS = "transitions.jsonl.gz"
"""The name of the log of transitions."""


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
