"""The journal of one run: this module is what others import; the tables are described in `tracking.schema`.

One SQLite file is the single source of truth about a run: its attempts, transitions, metrics, checkpoints
and messages. One thread of the trainer writes it (`open_attempt` gives the writer), anyone reads it
(`Journal`, or the views `transitions`, `all_transitions`, `metrics`, `all_metrics` with any SQLite tool), and
`settle` writes the end of an attempt whose process could not.
"""

from tracking.reader import Journal
from tracking.rows import (
    TRAIN,
    Attempt,
    AttemptStart,
    Checkpoint,
    CheckpointRow,
    LogRecord,
    Loss,
    Metric,
    Outcome,
    Packed,
    Parent,
    RunInfo,
    Transition,
)
from tracking.schema import JournalDamagedError, JournalError, JournalFormatError
from tracking.settling import DIED, Settled, settle
from tracking.writer import JournalStalledError, JournalWriter, open_attempt

__all__ = [
    "DIED",
    "TRAIN",
    "Attempt",
    "AttemptStart",
    "Checkpoint",
    "CheckpointRow",
    "Journal",
    "JournalDamagedError",
    "JournalError",
    "JournalFormatError",
    "JournalStalledError",
    "JournalWriter",
    "LogRecord",
    "Loss",
    "Metric",
    "Outcome",
    "Packed",
    "Parent",
    "RunInfo",
    "Settled",
    "Transition",
    "open_attempt",
    "settle",
]
