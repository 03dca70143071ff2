"""The values that go into a journal and come out of it, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from states.language import Chain
from states.table import State, Trigger

__all__ = [
    "TRAIN",
    "Attempt",
    "AttemptStart",
    "Checkpoint",
    "CheckpointRow",
    "LogRecord",
    "Loss",
    "Measured",
    "Metric",
    "Outcome",
    "Packed",
    "Parent",
    "RunInfo",
    "Transition",
]

TRAIN = "train"
"""The scope of the training itself; validation passes have scopes 'validation/NAME'."""

Outcome = Literal["done", "failed", "stopped", "died"]
"""How an attempt ended: DONE reached, an exception, a signal or halt, or without saying so."""


@dataclass(frozen=True)
class Parent:
    """The run that a run comes from, and the checkpoint of it: its whole state, or its weights only.

    `run` is the parent's id, `path` its folder when the child was made, `seq` the parent's transition that
    the child goes on from (None where that is not known), `checkpoint` the checkpoint's name.
    """

    run: str
    path: str
    seq: int | None
    checkpoint: str
    kind: Literal["branch", "warm start"]


@dataclass(frozen=True)
class RunInfo:
    """A run's identity: folder name, name, nanoseconds since 1970, the format of its journal, its parent."""

    id: str
    name: str
    created_ns: int
    format: int
    parent: Parent | None = None


@dataclass(frozen=True)
class AttemptStart:
    """What the trainer knows of an attempt when it begins; its number is chosen by the journal.

    `position` is the seq of the transition that the attempt goes back to (0: the very beginning), None for
    a run's first attempt. `process_started` is in seconds since 1970. `command` (anything
    that JSON can hold), `params` and `versions` are kept as JSON; values it cannot hold become their `str`.
    """

    position: int | None
    started_ns: int
    pid: int
    host: str
    process_started: float
    command: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""


@dataclass(frozen=True)
class Attempt:
    """One process's part of a run. `outcome`, `ended_ns` and `end_state` are None while it runs.

    Its transitions with a seq greater than `kept_until` are superseded by a later attempt (None: none is).
    """

    attempt: int
    position: int | None
    first_seq: int
    started_ns: int
    ended_ns: int | None
    pid: int
    host: str
    process_started: float
    end_state: State | None
    outcome: Outcome | None
    reason: str
    exception: str
    command: Any
    params: dict[str, Any]
    versions: dict[str, Any]
    device: str
    kept_until: int | None


class Transition(NamedTuple):
    """One completed transition. `epoch` and `batch` are -1 where there is none.

    `loss` is None where there is none (or none yet); NaN is a loss that was NaN.
    """

    seq: int
    attempt: int
    scope: str
    epoch: int
    batch: int
    phase: str
    trigger: Trigger
    source: State
    dest: State
    time_ns: int
    duration_ns: int
    loss: float | None
    note: str
    superseded: bool = False


class Packed(NamedTuple):
    """Consecutive transitions of one attempt, scope, epoch and batch, from seq `first` to `last`; see `Journal.packed`.

    `chain` is what they are; the same object for all that are alike. All are superseded, or none is.
    """

    first: int
    last: int
    attempt: int
    scope: str
    epoch: int
    batch: int
    chain: Chain
    superseded: bool


class Loss(NamedTuple):
    """The loss of one `forward` of the training; None where it has not arrived, NaN where it was NaN."""

    seq: int
    epoch: int
    batch: int
    phase: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of batches that follow each other, or of an epoch: a column of values for each key.

    `ids` are those of each batch's first value, and the next ones are those of its others.
    """

    attempt: int
    scope: str
    epoch: int
    superseded: bool
    keys: tuple[str, ...]
    ids: tuple[int, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    times_ns: tuple[int, ...]
    columns: tuple[tuple[float, ...], ...]

    @property
    def last(self) -> int:
        """The id of the last value."""
        return self.ids[-1] + len(self.keys) - 1

    def part(self, wanted: slice) -> "Measured":
        """Some of the batches."""
        return replace(
            self,
            ids=self.ids[wanted],
            batches=self.batches[wanted],
            steps=self.steps[wanted],
            times_ns=self.times_ns[wanted],
            columns=tuple(column[wanted] for column in self.columns),
        )


class Metric(NamedTuple):
    """One value. `id` goes up with insertion; `batch` is -1 for metrics of a whole epoch."""

    id: int
    attempt: int
    scope: str
    epoch: int
    batch: int
    step: int
    key: str
    value: float
    time_ns: int
    superseded: bool = False


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint as the trainer announces it, once it is durable; `seq` is the transition it stands at.

    `best` says that it was the best so far by the metric that is watched.
    """

    name: str
    seq: int
    epoch: int
    batch: int
    state: State
    size_bytes: int
    time_ns: int
    duration_ns: int = 0
    best: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the journal has it; `removed_ns` is None while its folder is there."""

    id: int
    name: str
    attempt: int
    seq: int
    epoch: int
    batch: int
    state: State
    size_bytes: int
    time_ns: int
    duration_ns: int
    best: bool
    metrics: dict[str, float]
    removed_ns: int | None
    superseded: bool


@dataclass(frozen=True)
class LogRecord:
    """One message of the trainer; `level` as in the standard library ('INFO', 'WARNING', ...)."""

    id: int
    attempt: int
    time_ns: int
    level: str
    message: str
