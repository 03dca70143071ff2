"""Which trigger comes next: a pure function of the situation. No torch, no clock, no effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from states.table import State, Trigger

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
    return CHOICES[situation.state](situation)


# -- what is next in each state ----------------------------------------------------------------------------


def _in_idle(s: Situation) -> Trigger:
    return Trigger.HALT if s.halt else Trigger.BEGIN_EPOCH


def _between_batches(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    return Trigger.FETCH if s.has_batch and s.batches_left and not s.stop else Trigger.END_EPOCH


def _in_batch_start(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    if not s.empty:
        return Trigger.FORWARD
    return Trigger.STEP if s.pending and s.window_closes else Trigger.END_BATCH


def _in_forward(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    return Trigger.END_BATCH if s.evaluating else Trigger.BACKWARD


def _in_backward(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    return Trigger.STEP if s.window_closes else Trigger.END_BATCH


def _in_step(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    return Trigger.FORWARD if s.another_phase else Trigger.END_BATCH


def _in_epoch_end(s: Situation) -> Trigger:
    if s.halt:
        return Trigger.HALT
    return Trigger.BEGIN_EPOCH if s.epochs_left and s.batches_left and not s.stop else Trigger.FINISH


def _at_the_end(s: Situation) -> None:
    return None


CHOICES: Mapping[State, Callable[[Situation], Trigger | None]] = {
    State.IDLE: _in_idle,
    State.EPOCH_START: _between_batches,
    State.BATCH_START: _in_batch_start,
    State.FORWARD: _in_forward,
    State.BACKWARD: _in_backward,
    State.STEP: _in_step,
    State.BATCH_END: _between_batches,
    State.EPOCH_END: _in_epoch_end,
    State.DONE: _at_the_end,
    State.HALTED: _at_the_end,
}
"""For each state the choice that is made in it."""
