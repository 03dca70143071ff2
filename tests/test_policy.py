"""The policy is total: in every situation exactly one legal next trigger, and training ends."""

from dataclasses import fields, replace

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy import Situation, ahead, next_trigger
from states.table import EVALUATION, TERMINAL, TRAINING, State, Trigger, arcs

FLAGS = [f.name for f in fields(Situation) if f.name not in ("state", "evaluating")]
TRAINING_MOVES = {(a.source, a.trigger): a.dest for a in arcs(TRAINING) if a.trigger is not Trigger.RESUME}
EVALUATION_MOVES = {(a.source, a.trigger): a.dest for a in arcs(EVALUATION)}

situations = st.builds(
    Situation, state=st.sampled_from(State), evaluating=st.just(False), **{f: st.booleans() for f in FLAGS}
)


@given(situations)
def test_one_legal_trigger_in_every_situation(situation: Situation) -> None:
    trigger = next_trigger(situation)
    if situation.state in TERMINAL:
        assert trigger is None
    else:
        assert (situation.state, trigger) in TRAINING_MOVES


@given(situations.filter(lambda s: s.state not in (State.BACKWARD, State.STEP)))
def test_one_legal_trigger_in_every_situation_of_an_evaluation(situation: Situation) -> None:
    situation = replace(situation, evaluating=True, pending=False)
    trigger = next_trigger(situation)
    if situation.state in TERMINAL:
        assert trigger is None
    else:
        assert (situation.state, trigger) in EVALUATION_MOVES


@given(situations, st.booleans())
def test_what_is_ahead_is_what_comes_next_one_by_one(situation: Situation, evaluating: bool) -> None:
    if evaluating:
        hypothesis.assume(situation.state not in (State.BACKWARD, State.STEP))
        situation = replace(situation, evaluating=True, pending=False)
    moves = EVALUATION_MOVES if evaluating else TRAINING_MOVES
    way = ahead(situation)
    assert bool(way) == (situation.state not in TERMINAL)
    for trigger in way:
        assert next_trigger(situation) is trigger
        situation.state = moves[situation.state, trigger]


@given(situations)
def test_the_situation_is_only_looked_at(situation: Situation) -> None:
    before = replace(situation)
    assert next_trigger(situation) is next_trigger(situation)
    assert situation == before


@given(situations.filter(lambda s: s.state not in TERMINAL))
def test_a_halt_comes_before_everything_else(situation: Situation) -> None:
    assert next_trigger(replace(situation, halt=True)) is Trigger.HALT


@given(
    epochs=st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=4),
    accumulate=st.integers(1, 3),
    phases=st.integers(1, 3),
    max_batches=st.none() | st.integers(1, 12),
    stop_after=st.none() | st.integers(0, 40),
)
def test_training_with_finite_loaders_ends(epochs, accumulate, phases, max_batches, stop_after) -> None:
    """Walk the policy over epochs of batches (True: empty) as the work would fill the situation in."""
    accumulate = 1 if phases > 1 else accumulate
    s = Situation()
    epoch, batch, batches, window, phase, moves = -1, -1, 0, 0, 0, 0
    trace = []
    while (trigger := next_trigger(s)) is not None:
        moves += 1
        assert moves < 1000
        trace.append(trigger)
        dest = TRAINING_MOVES[s.state, trigger]
        match trigger:
            case Trigger.BEGIN_EPOCH:
                epoch, batch, window = epoch + 1, -1, 0
                s.has_batch, s.pending = bool(epochs[epoch]), False
            case Trigger.FETCH:
                batch, phase = batch + 1, 0
                s.empty = epochs[epoch][batch]
                s.has_batch = batch + 1 < len(epochs[epoch])
                full = not s.empty and window + 1 >= accumulate
                s.window_closes = full or not s.has_batch
                s.another_phase = not s.empty and phases > 1
            case Trigger.FORWARD:
                phase += s.state is State.STEP
                s.another_phase = phase + 1 < phases
            case Trigger.BACKWARD:
                window, s.pending = window + 1, True
            case Trigger.STEP:
                assert s.pending
                window, s.pending = 0, False
            case Trigger.END_BATCH:
                batches += 1
                s.batches_left = max_batches is None or batches < max_batches
            case Trigger.END_EPOCH:
                s.epochs_left = epoch + 1 < len(epochs)
        s.state = dest
        s.stop = s.stop or (stop_after is not None and moves >= stop_after)
    assert s.state is State.DONE
    assert max_batches is None or batches <= max_batches
    if stop_after is None and max_batches is None:
        full = sum(not empty for e in epochs for empty in e)
        assert trace.count(Trigger.BACKWARD) == full * phases
        assert trace.count(Trigger.FETCH) == sum(map(len, epochs))
        expected = sum(-(-sum(not empty for empty in e) // accumulate) for e in epochs) * phases
        assert trace.count(Trigger.STEP) == expected
