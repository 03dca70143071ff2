"""CompiledMachine beside stock's Machine: random machines and walks, and which road each call takes."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transitions import Machine, MachineError
from transitions.core import Condition, Event, EventData, State, Transition

from states.compiled import CompiledMachine, CompiledState, CompiledTransition, Fallback
from states.table import TRAINING, arcs, event_name
from states.table import State as TrainingState

# --- side by side ---------------------------------------------------------------------------------------

NAMES = ("A", "B", "C", "D")
Letters = Enum("Letters", NAMES)  # type: ignore[misc]
TRIGGERS = ("go", "jump", "stay")
MACHINE_LISTS = (
    "prepare_event",
    "before_state_change",
    "after_state_change",
    "finalize_event",
    "on_exception",
    "on_final",
)
TRANSITION_LISTS = ("prepare", "before", "after")
STATE_LISTS = ("on_enter", "on_exit")


@dataclass(frozen=True)
class Spec:
    """A callback to be made once for each of the two machines."""

    label: int
    kind: str  # "note" | "raise" | "false" | "named" | "nested" | a kind of MUTATIONS
    pick: int = 0


# What a callback does to the machine while a transition is under way.
MUTATIONS = ("append", "replace list", "retarget", "finalise", "append model callback")
KINDS = ("note", "note", "note", "raise", "false", "named", "nested", *MUTATIONS)
specs = st.builds(Spec, st.integers(0, 99), st.sampled_from(KINDS), st.integers(0, 50))
callbacks = st.lists(specs, max_size=2)


class Model:
    """A model with methods to be called by name; `switch` exchanges one of them later."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def __getattr__(self, name: str) -> Any:
        if name.startswith("named_"):
            return self.twin.make(Spec(int(name.removeprefix("named_")), "note"))
        raise AttributeError(name)


class Twin:
    """One of the two machines, with everything that its callbacks have seen."""

    def __init__(self, cls: type[Machine], enum: bool, **options: Any) -> None:
        self.trace: list[Any] = []
        self.depth = 0
        self.kept: list[list[Any]] = []  # lists passed to the machine, to be changed by their owner later
        self.enum = enum
        self.attribute = options.get("model_attribute", "state")
        lists = {name: self.listed(options.pop(name, None)) for name in MACHINE_LISTS}
        self.models = [Model(self)]
        states = [self.state(0), self.state(1)]
        self.machine = cls(self.models[0], states=states, initial=states[0], **options, **lists)

    def state(self, index: int) -> Any:
        """The state of that index, as it is given to the machine."""
        return Letters[NAMES[index]] if self.enum else NAMES[index]

    def listed(self, wanted: Sequence[Spec] | None) -> Any:
        """Callbacks in the ways that machines take them: none, one, or a list that is kept."""
        if wanted is None:
            return None
        if len(wanted) == 1 and wanted[0].label % 2:
            return self.make(wanted[0])
        self.kept.append([self.make(spec) for spec in wanted])
        return self.kept[-1]

    def positions(self) -> list[str]:
        """Where each model stands."""
        return [str(getattr(model, self.attribute, None)) for model in self.models]

    def make(self, spec: Spec) -> Any:
        """The callback of that spec: a function that leaves a trace, or a name."""
        if spec.kind == "named":
            return f"named_{spec.label}"

        def callback(*args: Any, **kwargs: Any) -> bool:
            self.trace.append((spec.label, spec.kind, [describe(a) for a in args], kwargs, self.positions()))
            if spec.kind == "raise":
                raise KeyError(spec.label) if spec.pick % 4 else StopIteration(spec.label)
            if spec.kind == "nested" and self.depth < 2 and len(self.trace) < 60:
                self.depth += 1
                try:
                    self.trace.append(
                        self.fire(TRIGGERS[spec.pick % 3], spec.pick % len(self.models), "trigger")
                    )
                finally:
                    self.depth -= 1
            if spec.kind in MUTATIONS:
                self.mutate(spec)
            return spec.kind != "false"

        return callback

    def transitions(self) -> list[Transition]:
        """All transitions, in the same order in both twins."""
        return self.machine.get_transitions()

    def mutate(self, spec: Spec) -> None:
        """Change the machine from within a transition."""
        if spec.kind == "append":
            funcs = self.lists()[spec.pick % len(self.lists())]
            if len(funcs) < 4:
                funcs.append(self.make(Spec(spec.label + 100, "note")))
        elif spec.kind == "append model callback" and len(self.machine.get_state("A").on_enter) < 4:
            self.machine.on_enter_A(self.make(Spec(spec.label + 300, "note")))
        elif spec.kind != "append model callback" and (transitions := self.transitions()):
            transition = transitions[spec.pick % len(transitions)]
            if spec.kind == "replace list":
                setattr(
                    transition, TRANSITION_LISTS[spec.label % 3], [self.make(Spec(spec.label + 200, "note"))]
                )
            elif spec.kind == "retarget":
                transition.dest = NAMES[spec.label % 2]
            elif spec.kind == "finalise":
                state = self.machine.get_state(NAMES[spec.label % 2])
                state.final = not state.final

    def lists(self) -> list[list[Any]]:
        """Every list of callbacks that there is, in the same order in both twins."""
        found = [getattr(self.machine, name) for name in MACHINE_LISTS]
        found += [getattr(state, name) for state in self.machine.states.values() for name in STATE_LISTS]
        return found + [getattr(item, name) for item in self.transitions() for name in TRANSITION_LISTS]

    def fire(self, trigger: str, model: int, way: str, *args: Any, **kwargs: Any) -> Any:
        """Fire a trigger in one of the ways that there are; the result or the exception."""
        subject = self.models[model]
        try:
            if way == "model":
                return getattr(subject, trigger)(*args, **kwargs)
            if way == "trigger":
                return subject.trigger(trigger, *args, **kwargs)
            if way == "dispatch":
                return self.machine.dispatch(trigger, *args, **kwargs)
            return self.machine.events[trigger].trigger(subject, *args, **kwargs)
        except Exception as error:
            return type(error).__name__, re.sub(r"0x\w+|@\d+", "", str(error))


def describe(value: Any) -> Any:
    """What a callback was given, comparable between the twins."""
    if not isinstance(value, EventData):
        return value
    transition = value.transition
    return (
        value.state.name,
        value.event.name,
        value.args,
        value.kwargs,
        transition and (transition.source, transition.dest),
        type(value.error).__name__,
        value.result,
    )


class SideBySide(RuleBasedStateMachine):
    """Whatever is done to both machines, they answer alike and call the same callbacks in the same order."""

    @initialize(
        enum=st.booleans(),
        # Mostly False: what is not covered is stock's own code on both sides.
        send_event=st.sampled_from((False, False, False, True)),
        queued=st.sampled_from((False, False, False, True)),
        ignore=st.sampled_from((None, None, True)),
        auto=st.booleans(),
        attribute=st.sampled_from(("state", "state", "phase")),
        lists=st.dictionaries(st.sampled_from(MACHINE_LISTS), callbacks, max_size=2),
    )
    def make(
        self, enum: bool, send_event: bool, queued: bool, ignore: Any, auto: bool, attribute: str, lists: Any
    ) -> None:
        options = {
            "send_event": send_event,
            "queued": queued,
            "ignore_invalid_triggers": ignore,
            "auto_transitions": auto,
            "model_attribute": attribute,
            **lists,
        }
        self.twins = [Twin(cls, enum, **options) for cls in (Machine, CompiledMachine)]
        for twin in self.twins:
            for source, trigger in ((0, "go"), (1, "go"), (1, "jump")):
                twin.machine.add_transition(trigger, twin.state(source), twin.state(1 - source))

    def both(self, act: Callable[[Twin], Any]) -> None:
        """Do the same to both, compare what comes of it, and walk on a little."""
        self.compare(act)
        for model in (0, -1):
            for trigger in ("go", "jump", "go", "stay"):
                self.compare(lambda twin: twin.fire(trigger, model, "event"))  # noqa: B023

    def compare(self, act: Callable[[Twin], Any]) -> None:
        """Do the same to both, and compare what comes of it."""
        results = []
        for twin in self.twins:
            try:
                results.append(act(twin))
            except Exception as error:
                results.append((type(error).__name__, re.sub(r"0x\w+|@\d+", "", str(error))))
        assert results[0] == results[1]
        self.alike()

    @invariant()
    def alike(self) -> None:
        if hasattr(self, "twins"):
            stock, compiled = self.twins
            assert compiled.trace == stock.trace
            assert compiled.positions() == stock.positions()
            for twin in self.twins:
                twin.trace.clear()

    @rule(
        walk=st.lists(st.tuples(st.sampled_from(TRIGGERS), st.integers(0, 2)), min_size=1, max_size=4),
        way=st.sampled_from(("model", "trigger", "event", "event", "dispatch")),
        args=st.sampled_from(((), (), (1,))),
    )
    def fire(self, walk: list[tuple[str, int]], way: str, args: tuple[int, ...]) -> None:
        for trigger, model in walk:
            kwargs = {"key": 2} if args else {}
            self.compare(lambda twin: twin.fire(trigger, model % len(twin.models), way, *args, **kwargs))  # noqa: B023

    @rule(
        trigger=st.sampled_from(TRIGGERS),
        sources=st.sampled_from(([0], [1], [0, 1], [0, 2], "*")),
        dest=st.sampled_from((0, 1, 1, 2, "=", None)),
        lists=st.dictionaries(
            st.sampled_from((*TRANSITION_LISTS, "conditions", "unless")), callbacks, max_size=3
        ),
    )
    def add_transition(self, trigger: str, sources: Any, dest: Any, lists: dict[str, list[Spec]]) -> None:
        def act(twin: Twin) -> None:
            source = sources if sources == "*" else [twin.state(i) for i in sources]
            target = twin.state(dest) if isinstance(dest, int) else dest
            made = {name: twin.listed(wanted) for name, wanted in lists.items()}
            twin.machine.add_transition(trigger, source, target, **made)

        self.both(act)

    @rule(trigger=st.sampled_from(TRIGGERS), source=st.sampled_from((0, 1, None)), by_event=st.booleans())
    def remove_transition(self, trigger: str, source: int | None, by_event: bool) -> None:
        def act(twin: Twin) -> None:
            if by_event and source is not None:
                twin.machine.events[trigger].transitions[NAMES[source]].clear()
            else:
                twin.machine.remove_transition(trigger, "*" if source is None else NAMES[source])

        self.both(act)

    @rule(
        index=st.integers(0, 200),
        spec=specs,
        way=st.sampled_from(("append", "first", "insert", "clear", "pop")),
    )
    def change_list(self, index: int, spec: Spec, way: str) -> None:
        def act(twin: Twin) -> None:
            funcs = twin.lists()[index % len(twin.lists())]
            if way == "append":
                funcs.append(twin.make(spec))
            elif way == "insert":
                funcs.insert(0, twin.make(spec))
            elif way == "first":
                funcs[:1] = [twin.make(spec)]
            elif way == "clear":
                funcs.clear()
            elif funcs:
                funcs.pop()

        self.both(act)

    @rule(index=st.integers(0, 20), spec=specs)
    def change_kept_list(self, index: int, spec: Spec) -> None:
        assume(self.twins[0].kept)
        self.both(lambda twin: twin.kept[index % len(twin.kept)].append(twin.make(spec)))

    @rule(name=st.sampled_from(MACHINE_LISTS), wanted=callbacks)
    def reassign_machine_list(self, name: str, wanted: list[Spec]) -> None:
        self.both(lambda twin: setattr(twin.machine, name, twin.listed(wanted)))

    @rule(index=st.integers(0, 20), name=st.sampled_from(TRANSITION_LISTS), wanted=st.none() | callbacks)
    def reassign_transition_list(self, index: int, name: str, wanted: list[Spec] | None) -> None:
        def act(twin: Twin) -> None:
            found = twin.transitions()
            setattr(
                found[index % len(found)], name, None if wanted is None else [twin.make(s) for s in wanted]
            )

        self.both(act)

    @rule(index=st.integers(0, 3), name=st.sampled_from(STATE_LISTS), wanted=callbacks)
    def reassign_state_list(self, index: int, name: str, wanted: list[Spec]) -> None:
        self.both(
            lambda twin: setattr(
                twin.machine.get_state(NAMES[index]), name, [twin.make(spec) for spec in wanted]
            )
        )

    @rule(index=st.integers(0, 20), dest=st.sampled_from((0, 1, 2, None)))
    def retarget(self, index: int, dest: int | None) -> None:
        def act(twin: Twin) -> None:
            found = twin.transitions()
            found[index % len(found)].dest = None if dest is None else NAMES[dest]

        self.both(act)

    @rule(index=st.integers(0, 20), source=st.integers(0, 2))
    def resource(self, index: int, source: int) -> None:
        def act(twin: Twin) -> None:
            found = twin.transitions()
            found[index % len(found)].source = NAMES[source]

        self.both(act)

    @rule(index=st.integers(0, 20), spec=specs, expected=st.booleans())
    def change_conditions(self, index: int, spec: Spec, expected: bool) -> None:
        def act(twin: Twin) -> None:
            conditions = twin.transitions()[index % len(twin.transitions())].conditions
            if conditions and spec.pick % 2:
                conditions[0].target = expected
            else:
                conditions.append(Condition(twin.make(spec), expected))

        self.both(act)

    @rule(
        index=st.integers(0, 3),
        name=st.sampled_from(("final", "ignore_invalid_triggers")),
        value=st.sampled_from((True, False)),
    )
    def reassign_state_flag(self, index: int, name: str, value: bool) -> None:
        self.both(lambda twin: setattr(twin.machine.get_state(NAMES[index]), name, value))

    @rule(name=st.sampled_from(("send_event", "ignore_invalid_triggers")), value=st.booleans())
    def reassign_machine_flag(self, name: str, value: bool) -> None:
        self.both(lambda twin: setattr(twin.machine, name, value))

    @rule(index=st.integers(1, 3), wanted=callbacks, ready_made=st.booleans())
    def add_state(self, index: int, wanted: list[Spec], ready_made: bool) -> None:
        def act(twin: Twin) -> None:
            state = twin.state(index)
            if ready_made:
                twin.machine.add_states(State(state, on_enter=twin.listed(wanted)))
            else:
                twin.machine.add_states(state, on_enter=twin.listed(wanted), on_exit=twin.listed(wanted))

        self.both(act)

    @precondition(lambda self: len(self.twins[0].models) < 3)
    @rule()
    def add_model(self) -> None:
        def act(twin: Twin) -> None:
            twin.models.append(Model(twin))
            twin.machine.add_model(twin.models[-1])

        self.both(act)

    @rule(model=st.integers(0, 2), index=st.integers(0, 3), direct=st.booleans())
    def set_state(self, model: int, index: int, direct: bool) -> None:
        def act(twin: Twin) -> None:
            subject = twin.models[model % len(twin.models)]
            if (
                direct
            ):  # an equal string that is another object, or the name of a state that does not exist yet
                setattr(
                    subject, twin.attribute, twin.state(index) if twin.enum else "".join([NAMES[index], ""])
                )
            else:
                twin.machine.set_state(twin.state(index), subject)

        self.both(act)

    @rule(label=st.integers(0, 99))
    def exchange_named_callback(self, label: int) -> None:
        self.both(
            lambda twin: setattr(twin.models[0], f"named_{label}", twin.make(Spec(label + 1000, "note")))
        )


SideBySide.TestCase.settings = settings(
    max_examples=5 * settings.default.max_examples,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSideBySide = SideBySide.TestCase


# --- which road a call takes -----------------------------------------------------------------------------


class Bare:
    """A model with nothing of its own."""


class Thing:
    """A model for the roads; `seen` is what its callbacks saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def named(self, *args: Any, **kwargs: Any) -> bool:
        self.seen.append((args, kwargs))
        return True


def small(model: Any, **options: Any) -> CompiledMachine:
    """A machine with A -> B -> A."""
    options = {"states": ["A", "B"], "initial": "A", "auto_transitions": False, **options}
    machine = CompiledMachine(model, **options)
    machine.add_transition("go", "A", "B")
    machine.add_transition("go", "B", "A")
    return machine


def of_a(machine: CompiledMachine) -> Any:
    """The transition that leaves A."""
    return machine.get_transitions("go", "A")[0]


def note(model: Thing) -> Callable[..., bool]:
    """A callback that leaves a note and is true."""
    return lambda *args, **kwargs: model.named(*args, **kwargs)


def conditions(machine: CompiledMachine, model: Thing) -> None:
    of_a(machine).conditions.append(Condition(note(model)))
    of_a(machine).conditions.append(Condition("named", target=True))


FAST: dict[str, Callable[[CompiledMachine, Thing], Any]] = {
    "nothing but the change of state": lambda machine, model: model.named(),
    "prepare_event": lambda machine, model: machine.prepare_event.append(note(model)),
    "before_state_change": lambda machine, model: machine.before_state_change.append(note(model)),
    "after_state_change": lambda machine, model: machine.after_state_change.append(note(model)),
    "finalize_event": lambda machine, model: machine.finalize_event.append(note(model)),
    "on_final": lambda machine, model: (
        machine.on_final.append(note(model)),
        setattr(machine.get_state("B"), "final", True),
    ),
    "prepare": lambda machine, model: of_a(machine).add_callback("prepare", note(model)),
    "conditions": conditions,
    "before": lambda machine, model: machine.before_go(note(model)),
    "after": lambda machine, model: of_a(machine).after.append(note(model)),
    "on_exit": lambda machine, model: machine.on_exit_A(note(model)),
    "on_enter": lambda machine, model: machine.on_enter_B(note(model)),
    "a name": lambda machine, model: machine.on_enter_B("named"),
    "a list of the caller's": lambda machine, model: setattr(of_a(machine), "before", [note(model)]),
    "an internal transition": lambda machine, model: (
        setattr(of_a(machine), "dest", None),
        machine.before_go(note(model)),
    ),
    "a reflexive transition": lambda machine, model: (
        setattr(of_a(machine), "dest", "A"),
        machine.before_go(note(model)),
    ),
    "an exception that on_exception takes": lambda machine, model: (
        machine.on_exception.append(note(model)),
        machine.before_go(lambda *args, **kwargs: 1 / 0),
    ),
}


@pytest.mark.parametrize("args", [(), (1,)], ids=["without arguments", "with arguments"])
@pytest.mark.parametrize("feature", FAST)
def test_feature_takes_the_fast_path(
    feature: str, args: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Thing()
    machine = small(model)
    model.go(), model.go()  # plans are made, and have to be made again
    FAST[feature](machine, model)

    def stock(*_: Any) -> bool:
        raise AssertionError("stock's own code was called")

    monkeypatch.setattr(Event, "trigger", stock)
    monkeypatch.setattr(Event, "_trigger", stock)
    result = model.go(*args)
    assert result is (not feature.startswith("an exception"))
    assert model.seen
    assert feature.startswith("nothing") or model.seen[-1] == (args, {})
    assert not machine.fallbacks


def test_enum_states_and_other_attributes_take_the_fast_path() -> None:
    model = Bare()
    machine = small(model, states=[Letters.A, Letters.B], initial=Letters.A, model_attribute="phase")
    assert model.go() is True
    assert model.phase is Letters.B
    assert model.trigger("go") is True
    assert model.phase is Letters.A
    assert machine.events["go"].trigger(model) is True
    assert model.phase is Letters.B
    assert machine.dispatch("go") is True
    assert model.phase is Letters.A
    assert not machine.fallbacks


def test_machine_as_its_own_model_takes_the_fast_path() -> None:
    machine = small(CompiledMachine.self_literal)
    assert machine.go() is True
    assert machine.state == "B"
    assert not machine.fallbacks


class Loud(CompiledMachine):
    """Overrides a method that plans stand for."""

    def callback(self, func: Any, event_data: EventData) -> None:
        event_data.model.seen.append("loud")
        super().callback(func, event_data)


class Odd(Transition):
    """A transition of another class."""


def _queued(model: Thing) -> CompiledMachine:
    return small(model, queued=True)


def _send_event(model: Thing) -> CompiledMachine:
    machine = small(model)
    model.go(), model.go()
    machine.send_event = True
    return machine


def _logging(model: Thing) -> CompiledMachine:
    logging.getLogger("transitions").setLevel(logging.INFO)
    return small(model)


def _overridden(model: Thing) -> CompiledMachine:
    machine = small(model)
    machine.callbacks = machine.callbacks  # type: ignore[method-assign]
    return machine


def _foreign(model: Thing) -> CompiledMachine:
    return small(model, states=[State("A"), State("B")])


def _unknown_state(model: Thing) -> CompiledMachine:
    machine = small(model)
    machine.add_transition("go", "C", "A")
    model.state = "C"
    return machine


def _illegal(model: Thing) -> CompiledMachine:
    machine = small(model)
    machine.remove_transition("go", "A")
    return machine


FALLBACKS = {
    Fallback.QUEUED: _queued,
    Fallback.SEND_EVENT: _send_event,
    Fallback.LOGGING: _logging,
    Fallback.OVERRIDDEN: _overridden,
    Fallback.FOREIGN: _foreign,
    Fallback.UNKNOWN_STATE: _unknown_state,
    Fallback.ILLEGAL: _illegal,
}
RAISES = {Fallback.UNKNOWN_STATE: ValueError, Fallback.ILLEGAL: MachineError}


@pytest.fixture
def quiet_logger() -> Any:
    yield
    logging.getLogger("transitions").setLevel(logging.NOTSET)


@pytest.mark.parametrize("reason", Fallback)
def test_fallback_is_taken(reason: Fallback, quiet_logger: None) -> None:
    model = Thing()
    machine = FALLBACKS[reason](model)
    before = model.state
    if reason in RAISES:
        with pytest.raises(RAISES[reason]):
            model.go()
        assert model.state == before
    else:
        assert model.go() is True
        assert model.state == "B"
    assert dict(machine.fallbacks) == {reason: 1}


def patched_state(machine: CompiledMachine, model: Thing) -> None:
    machine.get_state("B").enter = lambda event_data: model.seen.append("patched")  # type: ignore[method-assign]


def patched_exit(machine: CompiledMachine, model: Thing) -> None:
    machine.get_state("A").exit = lambda event_data: model.seen.append("patched")  # type: ignore[method-assign]


def patched_condition(machine: CompiledMachine, model: Thing) -> None:
    condition = Condition("nowhere to be found")
    condition.check = lambda event_data: model.seen.append("patched") or True  # type: ignore[method-assign]
    of_a(machine).conditions.append(condition)


def patched_transition(machine: CompiledMachine, model: Thing) -> None:
    of_a(machine).execute = lambda event_data: model.seen.append("patched") or True


def foreign_transition(machine: CompiledMachine, model: Thing) -> None:
    machine.events["go"].transitions["A"][0] = Odd("A", "B", before=lambda: model.seen.append("patched"))


def foreign_condition(machine: CompiledMachine, model: Thing) -> None:
    class Patched(Condition):
        def check(self, event_data: EventData) -> bool:
            model.seen.append("patched")
            return True

    of_a(machine).conditions = [Patched(None)]


def another_dict(machine: CompiledMachine, model: Thing) -> None:
    transition = CompiledTransition("A", "B", before=lambda: model.seen.append("patched"))
    machine.events["go"].transitions = defaultdict(list, A=[transition])


def patched_event(machine: CompiledMachine, model: Thing) -> None:
    def process(event_data: EventData) -> None:
        model.seen.append("patched")
        event_data.result = True

    machine.events["go"]._process = process  # type: ignore[attr-defined]


CHANGES = (
    patched_state,
    patched_exit,
    patched_transition,
    patched_condition,
    foreign_transition,
    foreign_condition,
    another_dict,
)


# An event that is patched amid a call is being processed already.
@pytest.mark.parametrize(
    ("change", "amid"), [(patched_event, False), *itertools.product(CHANGES, (False, True))]
)
def test_what_plans_do_not_cover_is_noticed(change: Callable[..., None], amid: bool) -> None:
    """Also when a callback does it, before its turn comes in the transition under way."""
    model = Thing()
    machine = small(model)
    model.go(), model.go()
    if not amid:
        change(machine, model)
    elif change in (patched_state, patched_exit):
        machine.before_go(lambda: change(machine, model))
    else:
        machine.prepare_event = lambda: change(machine, model) if not model.seen else None
        if change is another_dict:
            machine.get_state("A").on_exit.append(lambda: None)
    assert model.go() is True
    assert model.seen == ["patched"]
    assert bool(machine.fallbacks) is not amid


def test_subclass_that_overrides_goes_to_stock_and_one_that_does_not_stays_fast() -> None:
    class Tagged(CompiledState):
        """Adds something, and overrides nothing."""

        tags = ("important",)

    class Plain(CompiledMachine):
        state_cls = Tagged

    for cls, count in ((Loud, 1), (Plain, 0)):
        model = Thing()
        machine = cls(model, states=["A", "B"], initial="A")
        machine.on_enter_B("named")
        model.to_B()
        assert sum(machine.fallbacks.values()) == count
        assert len(model.seen) == 1 + count


def test_a_removed_override_makes_calls_fast_again() -> None:
    model = Thing()
    machine = small(model)
    machine.set_state = machine.set_state  # type: ignore[method-assign]
    model.go()
    del machine.set_state
    model.go()
    assert dict(machine.fallbacks) == {Fallback.OVERRIDDEN: 1}


# --- what a transition under way sees ---------------------------------------------------------------------


def both_machines(build: Callable[[Any, Thing], Any]) -> tuple[Any, Any]:
    """What `build` observes with stock's machine and with the compiled one."""
    observed = []
    for cls in (Machine, CompiledMachine):
        model = Thing()
        machine = cls(model, states=["A", "B"], initial="A", auto_transitions=False)
        machine.add_transition("go", "A", "B")
        machine.add_transition("go", "B", "A")
        model.go(), model.go()
        try:
            result = build(machine, model)
        except Exception as error:
            result = repr(error)
        observed.append((result, model.seen, model.state))
    return observed[0], observed[1]


def lists_of(machine: Any) -> dict[str, list[Any]]:
    """The lists of callbacks that a transition from A to B goes through."""
    transition = machine.get_transitions("go", "A")[0]
    return {
        "prepare_event": machine.prepare_event,
        "prepare": transition.prepare,
        "before_state_change": machine.before_state_change,
        "before": transition.before,
        "on_exit": machine.get_state("A").on_exit,
        "on_enter": machine.get_state("B").on_enter,
        "after": transition.after,
        "after_state_change": machine.after_state_change,
        "finalize_event": machine.finalize_event,
    }


ORDER = tuple(lists_of(small(Thing())))


@pytest.mark.parametrize("later", ORDER)
@pytest.mark.parametrize("earlier", ORDER)
def test_callbacks_appended_by_a_callback(earlier: str, later: str) -> None:
    """Every list, itself included, may grow while it or one before it is walked."""

    def build(machine: Any, model: Thing) -> Any:
        lists = lists_of(machine)

        def grow() -> None:
            model.seen.append("grow")
            lists[later].append(lambda: model.seen.append("grown"))

        lists[earlier].append(grow)
        return model.go(), model.seen.clear(), model.go(), model.go()

    stock, compiled = both_machines(build)
    assert compiled == stock


@pytest.mark.parametrize("nothing", [None, (), "", "x"])
@pytest.mark.parametrize("name", ["prepare", "before", "after", "on_enter", "on_exit", "conditions"])
def test_lists_replaced_by_something_else(name: str, nothing: Any) -> None:
    """Stock fails on None, passes over what is empty, and walks a string by its letters."""

    def build(machine: Any, model: Thing) -> Any:
        owner = {"on_enter": machine.get_state("B"), "on_exit": machine.get_state("A")}
        setattr(owner.get(name, machine.get_transitions("go", "A")[0]), name, nothing)
        return model.go()

    stock, compiled = both_machines(build)
    assert compiled == stock


def test_state_that_goes_by_another_name_than_its_key() -> None:
    """Stock looks for the transitions of the name."""

    def build(machine: Any, model: Thing) -> Any:
        machine.get_state("A")._name = "B"
        machine.get_transitions("go", "B")[0].before.append(lambda: model.seen.append("from B"))
        return model.go()

    stock, compiled = both_machines(build)
    assert compiled == stock


def test_reached_state_that_a_property_made_unknown() -> None:
    for cls in (Machine, CompiledMachine):

        class Warped:
            """Stores another state than it is told."""

            where = "A"
            entered = False

            @property
            def state(self) -> str:
                return self.where

            @state.setter
            def state(self, value: str) -> None:
                self.where = "nowhere" if value == "B" else value

            def on_enter_B(self) -> None:
                self.entered = True

        model = Warped()
        machine = cls(model, states=["A", "B"], initial="A", model_override=False)
        with pytest.raises(ValueError, match="'nowhere' is not a registered state"):
            machine.events["to_B"].trigger(model)
        assert not model.entered


def test_transition_of_one_machine_added_to_another_is_left_to_stock() -> None:
    first, second = Thing(), Thing()
    one, two = small(first), small(second)
    first.go()
    two.events["go"].transitions["A"][:] = [of_a(one)]
    one.get_transitions("go", "A")[0].before.append("named")
    second.go()
    assert second.seen == [((), {})]
    assert dict(two.fallbacks) == {Fallback.FOREIGN: 1}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_are_fast_and_on_their_own(duplicate: Callable[[Any], Any]) -> None:
    machine = small(CompiledMachine.self_literal)
    machine.go(), machine.go()
    other = duplicate(machine)
    get = other.get_transitions("go", "A")[0]
    get.dest = "A"
    assert (other.go(), other.state) == (True, "A")
    get.dest = "B"
    assert (other.go(), other.state) == (True, "B")
    assert (machine.go(), machine.state) == (True, "B")
    assert not machine.fallbacks
    assert not other.fallbacks


def test_an_event_removed_from_the_machine_keeps_working_for_who_holds_it() -> None:
    def build(machine: Any, model: Thing) -> Any:
        held = machine.events["go"].trigger
        machine.remove_transition("go")
        return held(model), hasattr(model, "go"), machine.get_transitions()

    stock, compiled = both_machines(build)
    assert compiled == stock


# --- the trainer's table ---------------------------------------------------------------------------------


def training_machine(model: Any, calls: list[str]) -> CompiledMachine:
    """A machine over the whole table, each of whose transitions leaves a mark."""
    machine = CompiledMachine(model, states=TrainingState, initial=TrainingState.IDLE, auto_transitions=False)
    for arc in arcs(TRAINING):
        machine.add_transition(
            event_name(arc.trigger, arc.dest), arc.source, arc.dest, before=[lambda: calls.append("called")]
        )
    return machine


def test_every_move_of_the_table_is_fast_and_every_other_raises_and_changes_nothing() -> None:
    model, calls = Bare(), list[str]()
    machine = training_machine(model, calls)
    legal = {(event_name(arc.trigger, arc.dest), arc.source): arc.dest for arc in arcs(TRAINING)}
    for name, event in machine.events.items():
        for state in TrainingState:
            machine.set_state(state, model)
            calls.clear()
            machine.fallbacks.clear()
            if (name, state) in legal:
                assert event.trigger(model) is True
                assert model.state is legal[name, state]
                assert calls == ["called"]
                assert not machine.fallbacks
            else:
                with pytest.raises(MachineError):
                    event.trigger(model)
                assert model.state is state
                assert not calls


def test_raising_callbacks_leave_the_state_that_stock_leaves() -> None:
    """Before the change of state: the old one; after it: the new one."""

    def build(name: str) -> Callable[[Any, Thing], Any]:
        def act(machine: Any, model: Thing) -> Any:
            lists_of(machine)[name].append(lambda: 1 / 0)
            return model.go()

        return act

    for name in ORDER:
        stock, compiled = both_machines(build(name))
        assert compiled == stock
        assert compiled[2] == ("B" if ORDER.index(name) > ORDER.index("on_exit") else "A")
