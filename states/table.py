"""State, Trigger, and the one table of transitions that every machine of a run is built from."""

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "ARCS",
    "EVALUATION",
    "TERMINAL",
    "TRAINING",
    "Arc",
    "Row",
    "State",
    "Trigger",
    "arcs",
    "event_name",
]


class State(Enum):
    """Where a training stands: the work that the state is named for is complete."""

    __hash__ = object.__hash__  # Enum's own is a call of a Python function; members are compared by identity

    IDLE = "IDLE"
    EPOCH_START = "EPOCH_START"
    BATCH_START = "BATCH_START"
    FORWARD = "FORWARD"
    BACKWARD = "BACKWARD"
    STEP = "STEP"
    BATCH_END = "BATCH_END"
    EPOCH_END = "EPOCH_END"
    DONE = "DONE"
    HALTED = "HALTED"


class Trigger(Enum):
    """What moves a training from one state to the next; the value is the name in the journal."""

    __hash__ = object.__hash__

    BEGIN_EPOCH = "begin_epoch"
    FETCH = "fetch"
    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"
    END_BATCH = "end_batch"
    END_EPOCH = "end_epoch"
    FINISH = "finish"
    HALT = "halt"
    RESUME = "resume"


@dataclass(frozen=True)
class Row:
    """One row of the table: `trigger` leads from each of `sources` to `dest`."""

    trigger: Trigger
    sources: tuple[State, ...]
    dest: State


@dataclass(frozen=True)
class Arc:
    """One legal move, a row of the table with one of its sources."""

    trigger: Trigger
    source: State
    dest: State


TERMINAL = frozenset({State.DONE, State.HALTED})

_LIVE = tuple(state for state in State if state not in TERMINAL)

_COMMON = (
    Row(Trigger.BEGIN_EPOCH, (State.IDLE, State.EPOCH_END), State.EPOCH_START),
    Row(Trigger.FETCH, (State.EPOCH_START, State.BATCH_END), State.BATCH_START),
    Row(Trigger.END_EPOCH, (State.BATCH_END, State.EPOCH_START), State.EPOCH_END),
    Row(Trigger.FINISH, (State.EPOCH_END,), State.DONE),
)

TRAINING: tuple[Row, ...] = (
    *_COMMON,
    # STEP leads on to FORWARD when the batch has another phase.
    Row(Trigger.FORWARD, (State.BATCH_START, State.STEP), State.FORWARD),
    Row(Trigger.BACKWARD, (State.FORWARD,), State.BACKWARD),
    # BATCH_START leads to STEP when an empty batch closes a window with gradients pending.
    Row(Trigger.STEP, (State.BACKWARD, State.BATCH_START), State.STEP),
    # BACKWARD: the accumulation window stays open. BATCH_START: the batch was empty.
    Row(Trigger.END_BATCH, (State.STEP, State.BACKWARD, State.BATCH_START), State.BATCH_END),
    Row(Trigger.HALT, _LIVE, State.HALTED),
    *(Row(Trigger.RESUME, (State.HALTED,), state) for state in _LIVE),
)
"""What a training may do."""

EVALUATION: tuple[Row, ...] = (
    *_COMMON,
    Row(Trigger.FORWARD, (State.BATCH_START,), State.FORWARD),
    Row(Trigger.END_BATCH, (State.FORWARD, State.BATCH_START), State.BATCH_END),
    Row(
        Trigger.HALT,
        tuple(state for state in _LIVE if state not in (State.BACKWARD, State.STEP)),
        State.HALTED,
    ),
)
"""What a pass over an evaluation loader may do: nothing that changes weights, and no resuming."""


def arcs(table: tuple[Row, ...]) -> tuple[Arc, ...]:
    """Every legal move of `table`, in the table's order."""
    return tuple(Arc(row.trigger, source, row.dest) for row in table for source in row.sources)


ARCS: tuple[Arc, ...] = tuple(dict.fromkeys((*arcs(TRAINING), *arcs(EVALUATION))))
"""Every move of every table, once. An arc's index here is its code in the flight recorder."""


def event_name(trigger: Trigger, dest: State) -> str:
    """The name of the event in a `transitions.Machine`.

    An event has one destination for each source, so `resume` is one event for each state it leads to.
    """
    if trigger is Trigger.RESUME:
        return f"{trigger.value}_to_{dest.value}"
    return str(trigger.value)
