"""Which trigger comes next: a pure function of the situation. No torch, no clock, no effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from states.table import TERMINAL, State, Trigger

__all__ = ["CHOICES", "Situation", "next_trigger"]


@dataclass(slots=True)
class Situation:
    """Everything that the choice of the next trigger depends on; filled by the work of transitions."""

    state: State = State.IDLE
    evaluating: bool = False
    halt: bool = False
    """Somebody asked to halt: go to HALTED from where we stand."""
    stop: bool = False
    """Somebody asked to stop: finish the batch, end the epoch, go to DONE."""
    has_batch: bool = True
    """The order of this epoch holds another batch."""
    batches_left: bool = True
    """`max_batches` is not reached."""
    epochs_left: bool = True
    """`epochs` is not reached."""
    empty: bool = False
    """The batch at hand has no samples."""
    pending: bool = False
    """The open accumulation window holds gradients of earlier batches."""
    window_closes: bool = True
    """The batch at hand is the last of its accumulation window."""
    another_phase: bool = False
    """The batch at hand has a phase that has not been through yet."""


def next_trigger(situation: Situation) -> Trigger | None:
    """The one trigger that is next, or None where nothing is: DONE and HALTED."""
    if situation.halt and situation.state not in TERMINAL:
        return Trigger.HALT
    return CHOICES[situation.state](situation)


# -- what is next in each state, but for a halt --------------------------------------------------------------


def _between_batches(s: Situation) -> Trigger:
    return Trigger.FETCH if s.has_batch and s.batches_left and not s.stop else Trigger.END_EPOCH


def _in_batch_start(s: Situation) -> Trigger:
    if not s.empty:
        return Trigger.FORWARD
    return Trigger.STEP if s.pending and s.window_closes else Trigger.END_BATCH


def _in_epoch_end(s: Situation) -> Trigger:
    return Trigger.BEGIN_EPOCH if s.epochs_left and s.batches_left and not s.stop else Trigger.FINISH


# A chain of comparisons would be shorter, and take longer: reading a member of an Enum is a call.
CHOICES: Mapping[State, Callable[[Situation], Trigger | None]] = {
    State.IDLE: lambda s: Trigger.BEGIN_EPOCH,
    State.EPOCH_START: _between_batches,
    State.BATCH_START: _in_batch_start,
    State.FORWARD: lambda s: Trigger.END_BATCH if s.evaluating else Trigger.BACKWARD,
    State.BACKWARD: lambda s: Trigger.STEP if s.window_closes else Trigger.END_BATCH,
    State.STEP: lambda s: Trigger.FORWARD if s.another_phase else Trigger.END_BATCH,
    State.BATCH_END: _between_batches,
    State.EPOCH_END: _in_epoch_end,
    State.DONE: lambda s: None,
    State.HALTED: lambda s: None,
}
"""For each state, the trigger that is next in it, unless somebody asked to halt."""
