"""The loop: what `run` takes by itself is what `fire` leaves to the machine, call by call."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.loop import Loop, NestedTriggerError
from orchestrator.policy import Situation
from states.table import ARCS, EVALUATION, TRAINING, Row, State, Trigger

hooks = st.lists(
    st.tuples(st.sampled_from(["before", "after", "on"]), st.sampled_from(Trigger), st.sampled_from(State)),
    max_size=6,
)
batches = st.lists(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 2)), max_size=4), min_size=1, max_size=3
)


@dataclass
class Asked:
    open: bool = False


class Journey:
    """A loop over some epochs of batches (empty?, closes its window?, phases), and what was called in it."""

    def __init__(self, table: tuple[Row, ...], epochs: list[list[tuple[bool, bool, int]]]) -> None:
        self.calls: list[Any] = []
        self.situation = Situation(evaluating=table is EVALUATION)
        self.epochs, self.epoch, self.batch, self.phase = epochs, -1, -1, 0
        work: dict[Trigger, Callable[[], object]] = {t: self.called("work", t) for t in Trigger}
        work |= {Trigger.BEGIN_EPOCH: self.begin, Trigger.FETCH: self.fetch, Trigger.FORWARD: self.forward}
        self.loop = Loop(table, work, self.situation, lambda arc: self.calls.append(("journal", ARCS[arc])))

    def called(self, *what: object) -> Callable[[], None]:
        return lambda: self.calls.append((*what, self.loop.state))

    def begin(self) -> None:
        self.epoch, self.batch = self.epoch + 1, -1
        self.situation.epochs_left = self.epoch + 1 < len(self.epochs)
        self.situation.has_batch = bool(self.epochs[self.epoch])

    def fetch(self) -> None:
        self.batch, self.phase = self.batch + 1, 0
        empty, closes, phases = self.epochs[self.epoch][self.batch]
        s = self.situation
        s.empty, s.window_closes, s.another_phase = empty, closes, phases > 1
        s.has_batch = self.batch + 1 < len(self.epochs[self.epoch])

    def forward(self) -> None:
        self.phase += 1
        self.situation.another_phase = self.phase < self.epochs[self.epoch][self.batch][2]
        self.calls.append(("forward", self.loop.state))

    def hook(self, kind: str, number: int, trigger: Trigger, state: State) -> None:
        try:
            (self.loop.on(state) if kind == "on" else getattr(self.loop, kind)(trigger))(
                self.called(kind, number)
            )
        except ValueError:
            assert trigger not in {row.trigger for row in EVALUATION}


@given(st.sampled_from([TRAINING, EVALUATION]), batches, hooks)
def test_run_calls_what_fire_calls_in_the_same_order(
    table: tuple[Row, ...], epochs: list[Any], wanted: list[Any]
) -> None:
    fired, run = (Journey(table, epochs) for _ in range(2))
    for journey in (fired, run):
        for number, (kind, trigger, state) in enumerate(wanted):
            journey.hook(kind, number, trigger, state)
    while fired.loop.advance():
        pass
    run.loop.run(Asked(), lambda: None)
    assert run.calls == fired.calls
    assert run.loop.state is fired.loop.state is State.DONE
    assert run.loop.last == fired.loop.last


@pytest.mark.parametrize("whose", ["logger", "machine"])
def test_what_is_more_than_callbacks_is_left_to_the_machine(
    whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    journey = Journey(TRAINING, [[(False, True, 1)] * 2])
    left: list[State] = []
    if whose == "logger":
        caplog.set_level(logging.INFO, "transitions.core")
    else:
        journey.loop.machine.before_state_change = [lambda: left.append(journey.loop.state)]
    journey.loop.run(Asked(), lambda: None)
    assert journey.loop.state is State.DONE
    assert len(left) == (13 if whose == "machine" else 0)
    assert bool(caplog.records) == (whose == "logger")


def test_it_is_looked_at_between_epochs_and_wherever_that_is_asked_for() -> None:
    journey = Journey(TRAINING, [[(False, True, 1)] * 3])
    asked, looked = Asked(), []

    def look_up() -> None:
        looked.append(journey.loop.state)
        asked.open = len(looked) == 2

    journey.loop.after(Trigger.BACKWARD)(lambda: setattr(asked, "open", journey.batch == 1))
    journey.loop.run(asked, look_up)
    # Asked for in the second batch's backward; still open after that, and no more after the step that follows.
    assert looked == [State.EPOCH_START, State.BACKWARD, State.STEP, State.EPOCH_END, State.DONE]


def test_a_writer_takes_the_place_of_the_journal() -> None:
    journey = Journey(TRAINING, [[(False, True, 1)] * 3])
    written: list[int] = []
    journey.loop.run(Asked(), lambda: None, lambda arc: lambda: written.append(arc))
    assert [ARCS[arc].dest for arc in written[:3]] == [State.BATCH_START, State.FORWARD, State.BACKWARD]
    assert len(written) == 3 * 5
    left = [call[1].trigger for call in journey.calls if call[0] == "journal"]
    assert left == [Trigger.BEGIN_EPOCH, Trigger.END_EPOCH, Trigger.FINISH], (
        "the journal has what is of no batch"
    )


def test_a_hook_that_a_hook_adds_is_called_from_the_next_transition_on() -> None:
    journey = Journey(TRAINING, [[(False, True, 1)] * 2])
    heard: list[int] = []
    asked = Asked()

    def add() -> None:
        if journey.batch == 0:
            journey.loop.after(Trigger.STEP)(lambda: heard.append(journey.batch))

    journey.loop.after(Trigger.BACKWARD)(add)
    journey.loop.run(asked, lambda: setattr(asked, "open", False))
    assert heard == [0, 1]


def test_hooks_that_are_taken_away_are_called_no_more() -> None:
    journey = Journey(TRAINING, [[(False, True, 1)] * 3])
    heard: list[int] = []
    with journey.loop.hooks_kept():
        journey.loop.after(Trigger.STEP)(lambda: heard.append(journey.batch))
    journey.loop.run(Asked(), lambda: None)
    assert heard == []


def test_a_hook_that_fires_is_refused_and_what_it_raises_leaves_the_loop_outside() -> None:
    journey = Journey(TRAINING, [[(False, True, 1)]])
    journey.loop.after(Trigger.FORWARD)(lambda: journey.loop.fire(Trigger.BACKWARD))
    with pytest.raises(NestedTriggerError):
        journey.loop.run(Asked(), lambda: None)
    assert not journey.loop.inside
    assert journey.calls[-1] == ("forward", State.BATCH_START), "it is not journaled"
