"""Which trigger comes next: a pure function of the situation. No torch, no clock, no effects."""

from __future__ import annotations

from dataclasses import dataclass

from states.table import State, Trigger

__all__ = ["Situation", "next_trigger"]


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
    s = situation
    state = s.state
    if state is State.DONE or state is State.HALTED:
        return None
    if s.halt:
        return Trigger.HALT
    if state is State.BATCH_START:
        if not s.empty:
            return Trigger.FORWARD
        return Trigger.STEP if s.pending and s.window_closes else Trigger.END_BATCH
    if state is State.FORWARD:
        return Trigger.END_BATCH if s.evaluating else Trigger.BACKWARD
    if state is State.BACKWARD:
        return Trigger.STEP if s.window_closes else Trigger.END_BATCH
    if state is State.STEP:
        return Trigger.FORWARD if s.another_phase else Trigger.END_BATCH
    if state is State.BATCH_END or state is State.EPOCH_START:
        more = s.has_batch and s.batches_left and not s.stop
        return Trigger.FETCH if more else Trigger.END_EPOCH
    if state is State.EPOCH_END:
        more = s.epochs_left and s.batches_left and not s.stop
        return Trigger.BEGIN_EPOCH if more else Trigger.FINISH
    return Trigger.BEGIN_EPOCH  # IDLE
