"""One machine with the work of its transitions: built from a table, moved by the policy, hooks in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from orchestrator.policy import AHEAD, Situation, Way, ahead, next_trigger
from orchestrator.signatures import check_hook
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
    """The model of the machine: what `transitions` sets the state on, which is the situation's."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation

    @property
    def state(self) -> State:
        return self._situation.state

    @state.setter
    def state(self, state: State) -> None:
        self._situation.state = state


class _Link(NamedTuple):
    """A transition of a batch that has nothing but callbacks."""

    inside: list[Hook]
    dest: State
    arrived: list[Hook]


_Road = Callable[[], bool]
"""Makes transitions of a batch, one after the other; True where it ended early, as something was asked for."""
_OF_A_BATCH = (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH)


def _no_road() -> bool:
    return False


def _paved(links: list[_Link], situation: Situation, asked: Asked) -> _Road:
    """The calls of `links` written out one after the other: a loop over them costs a batch as much as a hook or two."""
    names: dict[str, object] = {"__name__": __name__, "situation": situation, "asked": asked}
    lines = ["def road():"]

    def call(hooks: list[Hook]) -> None:
        for hook in hooks:
            name = f"call_{len(names)}"
            names[name] = hook
            lines.append(f"    {name}()")

    for link in links:
        call(link.inside)
        names[link.dest.name] = link.dest
        lines.append(f"    situation.state = {link.dest.name}")
        call(link.arrived)
        lines.append("    if asked.open: return True")
    lines.append("    return False")
    title = f"<transitions to {', '.join(link.dest.value for link in links)}>"
    exec(compile("\n".join(lines), title, "exec"), names)
    return cast(_Road, names.pop("road"))  # no cycle, which would keep a model until it is found


class Loop:
    """A state machine whose transitions do the work.

    In one transition: the before-hooks, the work, the change of state, the after-hooks, the journal.
    Illegal moves raise `transitions.MachineError` and change nothing.

    `fire` leaves a transition to the machine. `run`, which goes through millions, takes those of batches that have
    nothing but callbacks itself, as many as the policy says are ahead: what they call is looked up once, made into one
    function, and looked up again after a hook was added.
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
        self._roads: dict[State, dict[Way, _Road]] = {}
        self._asked: Asked | None = None
        self._journal = journal
        situation.state = initial
        self._position = _Position(situation)
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
        self._triggers: dict[tuple[Trigger, State | None], Callable[[], bool]] = {}
        for row in table:
            dest = row.dest if row.trigger is Trigger.RESUME else None
            event = self.machine.events[event_name(row.trigger, row.dest)]
            self._triggers[row.trigger, dest] = partial(event.trigger, self._position)

    @property
    def state(self) -> State:
        """Where the machine stands."""
        return self.situation.state

    @property
    def inside(self) -> bool:
        """Whether a transition is under way."""
        return self._inside

    @property
    def last(self) -> Arc | None:
        """The last transition that was fired by itself, not by `run` as part of a batch; None before the first."""
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
        triggers, and alone says that `situation.halt`. `writer` gives, for an arc of a batch, a shorter way to do what
        the loop's own `journal` would.
        """
        self.check_outside()
        situation = self.situation
        self._roads, self._asked = {state: {} for state in State}, asked
        from_here = {state: (AHEAD[state], self._roads[state]) for state in State}
        self._inside = True
        try:
            while True:
                what_is_ahead, roads = from_here[situation.state]
                way = ahead(situation) if situation.halt else what_is_ahead(situation)
                try:
                    road = roads[way]
                except KeyError:
                    road = roads[way] = self._road(way, asked, writer)
                if road is not _no_road:
                    if not road():
                        continue
                elif way:
                    self._inside = False
                    self.fire(way[0])
                    if way[0] in _OF_A_BATCH:
                        self._forget_roads()  # by now the machine may have nothing but callbacks
                else:
                    return
                self._inside = False
                look_up()
                self._inside = True
        finally:
            self._inside = False
            self._roads, self._asked = {}, None

    def _road(self, way: Way, asked: Asked, writer: Callable[[int], Hook] | None) -> _Road:
        """What makes the transitions of `way` as they are now; `_no_road` where `fire` has to, or there are none."""
        links: list[_Link] = []
        source = self.situation.state
        for trigger in way:
            row = next((row for row in self._table if row.trigger is trigger and source in row.sources), None)
            if row is None or trigger not in _OF_A_BATCH:
                return _no_road
            event = event_name(trigger, row.dest)
            transition = self.machine.plain(event, source.name)
            if transition is None:
                return _no_road
            arc = ARCS.index(Arc(trigger, source, row.dest))
            after = [*self.machine.states[row.dest.name].on_enter, *transition.after]
            write = partial(self._journal, arc) if writer is None else writer(arc)
            links.append(
                _Link(cast(list[Hook], transition.before), row.dest, [*cast(list[Hook], after), write])
            )
            source = row.dest
        return _paved(links, self.situation, asked) if links else _no_road

    def _forget_roads(self) -> None:
        for of_state in self._roads.values():
            of_state.clear()

    def _changed(self) -> None:
        """Hooks were added or taken away: `run` finds out before its next transition."""
        self._forget_roads()
        if self._asked is not None:
            self._asked.open = True

    def stand(self, state: State) -> None:
        """Put the machine where the journal says it stands; used after work or a hook has raised."""
        self.machine.set_state(state, self._position)

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
            check_hook(hook)
            for transition in self._transitions(trigger):
                transition.before.insert(len(transition.before) - 1, hook)
            self._changed()
            return hook

        return register

    def after(self, trigger: Trigger) -> Callable[[HookT], HookT]:
        """A decorator: call the function after every transition of `trigger` has changed the state."""

        def register(hook: HookT) -> HookT:
            check_hook(hook)
            for transition in self._transitions(trigger):
                transition.after.append(hook)
            self._changed()
            return hook

        return register

    def on(self, state: State) -> Callable[[HookT], HookT]:
        """A decorator: call the function whenever `state` is entered."""

        def register(hook: HookT) -> HookT:
            check_hook(hook)
            self.machine.get_state(state).on_enter.append(cast(Callable[[], None], hook))
            self._changed()
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
            self._changed()

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
