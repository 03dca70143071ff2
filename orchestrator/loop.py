"""One machine with the work of its transitions: built from a table, moved by the policy, hooks in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from transitions import State as MachineState
from transitions import Transition

from orchestrator.policy import CHOICES, Situation, next_trigger
from states.compiled import CompiledMachine
from states.errors import InterlockError
from states.table import ARCS, Arc, Row, State, Trigger, event_name

__all__ = ["Asked", "Hook", "Loop", "NestedTriggerError"]

Hook = Callable[[], object]
HookT = TypeVar("HookT", bound=Hook)


class NestedTriggerError(InterlockError):
    """A trigger was fired from inside a transition; only the loop fires triggers, one at a time."""


class Asked(Protocol):
    """Whoever may want to be looked at between two transitions."""

    open: bool


class _Position:
    """The model of the machine: what `transitions` sets the state on."""

    state: State


class _Link:
    """A transition that has nothing but callbacks, as `run` takes it. The lists are those of the machine."""

    __slots__ = ("after", "arc", "before", "choose", "dest", "enter", "looks", "next", "write")

    before: list[Hook]
    enter: list[Hook]
    after: list[Hook]

    def __init__(
        self, transition: Transition, dest: MachineState, arc: int, next: _Links, write: Hook
    ) -> None:
        self.before, self.after = cast(list[Hook], transition.before), cast(list[Hook], transition.after)
        self.enter = cast(list[Hook], dest.on_enter)
        self.dest = ARCS[arc].dest
        self.arc, self.next, self.write = arc, next, write
        self.choose = CHOICES[self.dest]
        self.looks = ARCS[arc].trigger not in _OF_A_BATCH


_Links = dict[Trigger, _Link]
_OF_A_BATCH = (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH)


class Loop:
    """A state machine whose transitions do the work.

    In one transition: the before-hooks, the work, the change of state, the after-hooks, the journal.
    Illegal moves raise `transitions.MachineError` and change nothing.

    `fire` leaves a transition to the machine. `run`, which goes through millions, takes those that have nothing but
    callbacks itself, by the machine's own lists: states are linked to those that follow, and nothing is looked up.
    """

    def __init__(
        self,
        table: tuple[Row, ...],
        work: Mapping[Trigger, Callable[[], object]],
        situation: Situation,
        journal: Callable[[int], object],
        initial: State = State.IDLE,
    ) -> None:
        self.situation = situation
        self._last: int | None = None
        self._inside = False
        self._journal = journal
        self._position = _Position()
        self._table = table
        self.machine = CompiledMachine(
            model=self._position,
            states=State,
            initial=initial,
            auto_transitions=False,
            transitions=[
                {
                    "trigger": event_name(row.trigger, row.dest),
                    "source": source,
                    "dest": row.dest,
                    "before": [work[row.trigger]],
                    "after": [],
                }
                for row in table
                for source in row.sources
            ],
        )
        situation.state = initial
        self._triggers: dict[tuple[Trigger, State | None], Callable[[], bool]] = {}
        for row in table:
            dest = row.dest if row.trigger is Trigger.RESUME else None
            event = self.machine.events[event_name(row.trigger, row.dest)]
            self._triggers[row.trigger, dest] = partial(event.trigger, self._position)

    @property
    def state(self) -> State:
        """Where the machine stands."""
        return self._position.state

    @property
    def inside(self) -> bool:
        """Whether a transition is under way."""
        return self._inside

    @property
    def last(self) -> Arc | None:
        """The last transition; None before the first."""
        return None if self._last is None else ARCS[self._last]

    def advance(self) -> bool:
        """Fire the next trigger; False if there is none."""
        trigger = next_trigger(self.situation)
        if trigger is None:
            return False
        self.fire(trigger)
        return True

    def fire(self, trigger: Trigger, dest: State | None = None) -> None:
        """Fire `trigger` (for `resume`: to `dest`). What work or hooks raise passes through unchanged."""
        self.check_outside()
        position, source = self._position, self._position.state
        self._inside = True
        try:
            self._triggers[trigger, dest]()
            self._last = ARCS.index(Arc(trigger, source, position.state))
            self._journal(self._last)
            self.situation.state = position.state
        finally:
            self._inside = False

    def run(
        self,
        asked: Asked,
        look_up: Callable[[], object],
        writer: Callable[[int], Hook] | None = None,
    ) -> None:
        """Fire the next trigger until nothing is left.

        `look_up` is called between two transitions, but after those of batches only where `asked.open`. It may fire
        triggers. `writer` gives, for an arc, a shorter way to do what the loop's own `journal` would.
        """
        self.check_outside()
        situation, position = self.situation, self._position
        moves = self._linked(writer)
        links, choose = moves[position.state], CHOICES[position.state]
        self._inside = True
        try:
            while True:
                trigger = next_trigger(situation) if situation.halt else choose(situation)
                if trigger is None:
                    return
                link = links.get(trigger)
                if link is None:  # more than callbacks belongs to it
                    self._inside = False
                    self.fire(trigger)
                    look_up()
                    self._inside = True
                    moves = self._linked(writer)
                    links, choose = moves[position.state], CHOICES[position.state]
                    continue
                for call in link.before:
                    call()
                position.state = link.dest
                for call in link.enter:
                    call()
                for call in link.after:
                    call()
                self._last = link.arc
                link.write()
                situation.state = link.dest
                links, choose = link.next, link.choose
                if link.looks or asked.open:
                    self._inside = False
                    look_up()
                    self._inside = True
                    links, choose = moves[position.state], CHOICES[position.state]
        finally:
            self._inside = False

    def _linked(self, writer: Callable[[int], Hook] | None) -> dict[State, _Links]:
        """The links that lead from each state, as the machine is now."""
        writer = writer or (lambda arc: partial(self._journal, arc))
        moves: dict[State, _Links] = {state: {} for state in State}
        for row in self._table:
            for source in row.sources:
                transition = self.machine.plain(event_name(row.trigger, row.dest), source.name)
                if transition is not None and row.trigger is not Trigger.RESUME:
                    arc = ARCS.index(Arc(row.trigger, source, row.dest))
                    dest = self.machine.states[row.dest.name]
                    moves[source][row.trigger] = _Link(transition, dest, arc, moves[row.dest], writer(arc))
        return moves

    def stand(self, state: State) -> None:
        """Put the machine where the journal says it stands; used after work or a hook has raised."""
        self.machine.set_state(state, self._position)
        self.situation.state = state

    def check_outside(self) -> None:
        """Raise NestedTriggerError if a transition is under way."""
        if self._inside:
            raise NestedTriggerError(
                "a trigger was fired from inside a transition; hooks may only request: "
                "use trainer.save(), trainer.stop(reason) or trainer.halt(reason)"
            )

    def before(self, trigger: Trigger) -> Callable[[HookT], HookT]:
        """A decorator: call the function before the work of every transition of `trigger`."""

        def register(hook: HookT) -> HookT:
            for transition in self._transitions(trigger):
                transition.before.insert(len(transition.before) - 1, hook)
            return hook

        return register

    def after(self, trigger: Trigger) -> Callable[[HookT], HookT]:
        """A decorator: call the function after every transition of `trigger` has changed the state."""

        def register(hook: HookT) -> HookT:
            for transition in self._transitions(trigger):
                transition.after.append(hook)
            return hook

        return register

    def on(self, state: State) -> Callable[[HookT], HookT]:
        """A decorator: call the function whenever `state` is entered."""

        def register(hook: HookT) -> HookT:
            self.machine.get_state(state).on_enter.append(cast(Callable[[], None], hook))
            return hook

        return register

    @contextmanager
    def hooks_kept(self) -> Iterator[None]:
        """Take away afterwards whatever hooks were added meanwhile."""
        lists = [state.on_enter for state in self.machine.states.values()]
        for event in self.machine.events.values():
            for transition in (t for of_source in event.transitions.values() for t in of_source):
                lists += [transition.before, transition.after]
        kept = [list(hooks) for hooks in lists]
        try:
            yield
        finally:
            for hooks, before in zip(lists, kept, strict=True):
                hooks[:] = before

    def hooks_before(self, trigger: Trigger) -> list[object]:
        """What is called before the work of `trigger`."""
        return [hook for transition in self._transitions(trigger) for hook in transition.before[:-1]]

    def hooks_after(self, trigger: Trigger, dest: State) -> list[object]:
        """What is called after the work of `trigger`, and as `dest` is entered."""
        after = [hook for transition in self._transitions(trigger) for hook in transition.after]
        return [*after, *self.machine.get_state(dest).on_enter]

    def hooks(self) -> list[object]:
        """Everything that is called by a transition."""
        found: list[object] = []
        for event in self.machine.events.values():
            for of_source in event.transitions.values():
                for transition in of_source:
                    found += [*transition.before, *transition.after]
        for state in self.machine.states.values():
            found += state.on_enter
        return found

    def _transitions(self, trigger: Trigger) -> list[Any]:
        found = [
            transition
            for name, event in self.machine.events.items()
            if name == trigger.value or name.startswith(f"{trigger.value}_to_")
            for of_source in event.transitions.values()
            for transition in of_source
        ]
        if not found:
            raise ValueError(f"no transition of this machine is triggered by {trigger.value}")
        return found
