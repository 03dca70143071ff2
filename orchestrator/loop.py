"""One machine with the work of its transitions: built from a table, moved by the policy, hooks in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

from orchestrator.policy import Situation, next_trigger
from states.compiled import CompiledMachine
from states.errors import InterlockError
from states.table import ARCS, Arc, Row, State, Trigger, event_name

__all__ = ["Loop", "NestedTriggerError"]

Hook = Callable[[], object]
HookT = TypeVar("HookT", bound=Hook)


class NestedTriggerError(InterlockError):
    """A trigger was fired from inside a transition; only the loop fires triggers, one at a time."""


class _Position:
    """The model of the machine: what `transitions` sets the state on."""

    state: State


class Loop:
    """A state machine whose transitions do the work.

    In one transition: the before-hooks, the work, the change of state, the after-hooks, the journal.
    Illegal moves raise `transitions.MachineError` and change nothing.
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
        self.last: Arc | None = None
        self._inside = False
        self._journal = journal
        self._position = _Position()
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
                    "before": [self._enter, work[row.trigger]],
                    "after": [partial(self._leave, ARCS.index(Arc(row.trigger, source, row.dest)))],
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
        try:
            self._triggers[trigger, dest]()
        finally:
            self._inside = False

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

    def _enter(self) -> None:
        self.check_outside()
        self._inside = True

    def _leave(self, arc: int) -> None:
        self._journal(arc)
        self.last = ARCS[arc]
        self.situation.state = self.last.dest
        self._inside = False

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
                transition.after.insert(len(transition.after) - 1, hook)
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
        return [hook for transition in self._transitions(trigger) for hook in transition.before[1:-1]]

    def hooks_after(self, trigger: Trigger, dest: State) -> list[object]:
        """What is called after the work of `trigger`, and as `dest` is entered."""
        after = [hook for transition in self._transitions(trigger) for hook in transition.after[:-1]]
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
