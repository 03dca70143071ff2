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
    """Before the first epoch."""
    EPOCH_START = "EPOCH_START"
    """The epoch's order of data is fixed, its metrics are reset."""
    BATCH_START = "BATCH_START"
    """The batch is there, on the device."""
    FORWARD = "FORWARD"
    """Outputs and loss are computed."""
    BACKWARD = "BACKWARD"
    """Gradients are computed."""
    STEP = "STEP"
    """The update is applied, or left out because something was not finite."""
    BATCH_END = "BATCH_END"
    """The batch is counted, its values are part of the epoch's."""
    EPOCH_END = "EPOCH_END"
    """The epoch's metrics are there, validation included."""
    DONE = "DONE"
    """The training is over."""
    HALTED = "HALTED"
    """The training was interrupted; `resume` leads on."""


class Trigger(Enum):
    """What moves a training from one state to the next; the value is the name in the journal."""

    __hash__ = object.__hash__

    BEGIN_EPOCH = "begin_epoch"
    """Fixes the epoch's order of data and resets its metrics."""
    FETCH = "fetch"
    """Takes the batch and moves it to the device."""
    FORWARD = "forward"
    """Computes outputs, loss and the batch's metrics."""
    BACKWARD = "backward"
    """Zeroes gradients where an accumulation window begins; computes those of the batch."""
    STEP = "step"
    """Looks whether all is finite, clips, and lets the optimizer update."""
    END_BATCH = "end_batch"
    """Counts the batch; validates where that is due."""
    END_EPOCH = "end_epoch"
    """Averages the epoch's metrics; validates."""
    FINISH = "finish"
    """Ends the training."""
    HALT = "halt"
    """Interrupts the training, in any state but DONE."""
    RESUME = "resume"
    """Restores the state that the training was halted in."""


@dataclass(frozen=True)
class Row:
    """One row of the table: `trigger` leads from each of `sources` to `dest`."""

    trigger: Trigger
    sources: tuple[State, ...]
    dest: State


@dataclass(frozen=True)
class Arc:
    """One legal move, a row of the table with one of its sources: `trigger` leads from `source` to `dest`."""

    trigger: Trigger
    source: State
    dest: State

    def __repr__(self) -> str:
        # `advance` gives it to a prompt, or to a notebook's cell.
        return f"<{self}>"

    def __str__(self) -> str:
        return f"{self.source.value} → {self.dest.value} ({self.trigger.value})"


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
