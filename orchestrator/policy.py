"""Which trigger comes next: a pure function of the situation. No torch, no clock, no effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from states.table import TERMINAL, State, Trigger

__all__ = ["AHEAD", "Situation", "Way", "ahead", "next_trigger"]

Way = tuple[Trigger, ...]
"""Triggers that follow one another."""


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
    way = ahead(situation)
    return way[0] if way else None


def ahead(situation: Situation) -> Way:
    """The triggers that come next, as far as the situation settles them: within a batch all of them, to its end.

    Empty where nothing is next: DONE and HALTED.
    """
    if situation.halt and situation.state not in TERMINAL:
        return (Trigger.HALT,)
    return AHEAD[situation.state](situation)


# -- what is ahead in each state, but for a halt -------------------------------------------------------------

_BEGIN_EPOCH, _END_EPOCH, _FINISH = (Trigger.BEGIN_EPOCH,), (Trigger.END_EPOCH,), (Trigger.FINISH,)
_FETCH, _FORWARD, _BACKWARD, _END_BATCH = Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.END_BATCH
_TO_FETCH, _TO_FORWARD, _TO_THE_END = (_FETCH,), (_FORWARD,), (_END_BATCH,)
_EVALUATED = (_FORWARD, _END_BATCH)
_OPEN, _WHOLE = (_FORWARD, _BACKWARD, _END_BATCH), (_FORWARD, _BACKWARD, Trigger.STEP, _END_BATCH)


def _between_batches(s: Situation) -> Way:
    return _TO_FETCH if s.has_batch and s.batches_left and not s.stop else _END_EPOCH


def _in_batch_start(s: Situation) -> Way:
    if s.empty:
        return (Trigger.STEP,) if s.pending and s.window_closes else _TO_THE_END
    if s.evaluating:
        return _EVALUATED
    if s.another_phase:
        return _TO_FORWARD
    return _WHOLE if s.window_closes else _OPEN


def _in_epoch_end(s: Situation) -> Way:
    return _BEGIN_EPOCH if s.epochs_left and s.batches_left and not s.stop else _FINISH


AHEAD: Mapping[State, Callable[[Situation], Way]] = {
    State.IDLE: lambda s: _BEGIN_EPOCH,
    State.EPOCH_START: _between_batches,
    State.BATCH_START: _in_batch_start,
    State.FORWARD: lambda s: _TO_THE_END if s.evaluating else (_BACKWARD,),
    State.BACKWARD: lambda s: (Trigger.STEP,) if s.window_closes else _TO_THE_END,
    State.STEP: lambda s: _TO_FORWARD if s.another_phase else _TO_THE_END,
    State.BATCH_END: _between_batches,
    State.EPOCH_END: _in_epoch_end,
    State.DONE: lambda s: (),
    State.HALTED: lambda s: (),
}
"""For each state, what is ahead in it, unless somebody asked to halt."""
