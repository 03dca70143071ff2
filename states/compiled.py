"""CompiledMachine: a drop-in `transitions.Machine` whose events are planned once and then only carried out.

Stock decides anew in each call what is to be done, by a dozen method calls, an `EventData` and two
partials. A `CompiledEvent` keeps a `_Plan` for each state it is fired in: the one transition to take, or
the reason why the call belongs to stock's own code (`Fallback`).

Plans are not guarded by checks in the call; what they were made from tells when it changes. Machines,
transitions and states report assignments to their attributes, the machine's own dicts and lists report
mutations, and whoever is told brings all steps up to date *in place*. So a transition under way sees what
its callbacks change, as it does in stock. Only two things are ever assumed: which transition is next, and
that a list made by the machine is still empty. All other lists of callbacks, the ones that a caller
passed in and may still hold above all, are walked as they are when their turn comes, and names in them are
resolved then.

Measured for five events with two callbacks each: stock 44 µs; everything read live in each call, no plans and
nothing to observe, 3.9 µs (whether ten lists are empty, and four look-ups, cost more than all the rest);
plans 2.4 µs. A guard that compares the lists with copies would cost as much as walking them.

What is not noticed: methods patched onto the classes of `transitions` once a machine is in use; and a
change of `send_event`, `queued` or `model_attribute` made by a callback counts from the next event on, not in
the middle of the one under way.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from functools import wraps
from types import FunctionType, MethodType
from typing import Any, cast
from weakref import WeakSet

from transitions.core import Condition, Event, EventData, Machine, State, Transition, listify

__all__ = ["CompiledEvent", "CompiledMachine", "CompiledState", "CompiledTransition", "Fallback"]

_LOGGER = logging.getLogger("transitions.core")
_records = _LOGGER.isEnabledFor
_INFO = logging.INFO


class Fallback(Enum):
    """Why a call was left to stock's own code."""

    QUEUED = "the machine is queued: events wait for the one under way"
    SEND_EVENT = "send_event is set: callbacks are given an EventData"
    LOGGING = "the logger of transitions is enabled for INFO: each step leaves a record"
    OVERRIDDEN = "a method that the plan stands for is overridden in the machine, event, transition or state"
    FOREIGN = (
        "a State, Transition, Condition or dict that the machine did not make itself, and cannot observe"
    )
    UNKNOWN_STATE = "the model's state is none of the machine's: stock raises"
    ILLEGAL = "no transition leads from the model's state by this event: stock raises, or ignores it"


# --- what reports its changes --------------------------------------------------------------------------


class _Watch:
    """A machine's settings as its events read them, and all that is to be told when something changes.

    Invariant: after any assignment to a watched attribute of the machine the settings equal the machine's.
    (They are copied because `Machine.__getattr__` makes each read of an attribute five times as slow.)
    """

    def __init__(self) -> None:
        self.fallbacks: Counter[Fallback] = Counter()
        self.fallback: Fallback | None = None
        self.dependents: WeakSet[CompiledEvent | _Step] = WeakSet()
        self.prepare_event: Any = []
        self.before_state_change: Any = []
        self.after_state_change: Any = []
        self.finalize_event: Any = []
        self.on_exception: Any = []
        self.on_final: Any = []
        self.states: Any = {}
        self.model_attribute = "state"
        self.usual = True

    def __getstate__(self) -> dict[str, Any]:
        # Whoever depends on a copy says so when it makes its first plan.
        return {**vars(self), "dependents": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, dependents=WeakSet())

    def reread(self, machine: CompiledMachine) -> None:
        """Take over the machine's settings as they are now."""
        own = vars(machine)
        for name in _LISTS:
            setattr(self, name, own.get("_" + name, []))
        self.states = own.get("states", {})
        self.model_attribute = own.get("model_attribute", "state")
        self.usual = self.model_attribute == "state"  # model.state costs a fifth of getattr(model, name)
        self.fallback = _machine_fallback(machine)
        self.changed()

    def changed(self) -> None:
        """Bring everything that was derived from the machine up to date."""
        for dependent in tuple(self.dependents):
            dependent.refresh()

    def claim(self, thing: Any) -> bool:
        """Whether `thing` reports its changes here (from now on, if it reported to nobody yet)."""
        if thing._watch is None:
            thing._watch = self
        return thing._watch is self

    def knows_empty(self, funcs: object) -> bool:
        """Whether a list is empty and will say so when it no longer is."""
        return type(funcs) is _List and not funcs and self.claim(funcs)


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def report(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            if self._watch is not None:
                self._watch.changed()

    return report


class _Watched:
    """Something that reports its changes; a copy reports to nobody until its own machine claims it."""

    _watch: _Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_watch", "_step")}


class _List(_Watched, list[Any]):
    """A list made by the machine; reports mutations to its watch."""

    append = _reporting(list.append)
    extend = _reporting(list.extend)
    insert = _reporting(list.insert)
    remove = _reporting(list.remove)
    pop = _reporting(list.pop)
    clear = _reporting(list.clear)
    sort = _reporting(list.sort)
    reverse = _reporting(list.reverse)
    __setitem__ = _reporting(list.__setitem__)
    __delitem__ = _reporting(list.__delitem__)
    __iadd__ = _reporting(list.__iadd__)
    __imul__ = _reporting(list.__imul__)


class _States(_Watched, OrderedDict[str, State]):
    """The states of a machine by name; reports mutations to its watch."""

    __setitem__ = _reporting(OrderedDict.__setitem__)
    __delitem__ = _reporting(OrderedDict.__delitem__)
    clear = _reporting(OrderedDict.clear)
    pop = _reporting(OrderedDict.pop)
    popitem = _reporting(OrderedDict.popitem)
    setdefault = _reporting(OrderedDict.setdefault)
    update = _reporting(OrderedDict.update)
    __ior__ = _reporting(OrderedDict.__ior__)


class _Transitions(_Watched, defaultdict[str, list[Transition]]):
    """The transitions of an event by source; reports mutations to its watch, and so do the lists in it."""

    __setitem__ = _reporting(defaultdict.__setitem__)
    __delitem__ = _reporting(defaultdict.__delitem__)
    clear = _reporting(defaultdict.clear)
    pop = _reporting(defaultdict.pop)
    popitem = _reporting(defaultdict.popitem)
    setdefault = _reporting(defaultdict.setdefault)
    update = _reporting(defaultdict.update)
    __ior__ = _reporting(defaultdict.__ior__)


class _StockName:
    """Shows itself under the name that stock's own class has."""

    def __repr__(self) -> str:
        return super().__repr__().replace("<Compiled", "<", 1)


class _Reporter(_StockName, _Watched):
    """An object that reports assignments to its attributes to its watch."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._watch is not None and name != "_watch":
            self._watch.changed()

    def __delattr__(self, name: str) -> None:
        watch = self._watch
        super().__delattr__(name)
        if watch is not None:
            watch.changed()


class CompiledState(_Reporter, State):
    """A `State` whose changes are noticed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Stock keeps a list that it was given, unless that is empty.
        self.on_enter = self.on_enter or _List()
        self.on_exit = self.on_exit or _List()


class CompiledTransition(_Reporter, Transition):
    """A `Transition` whose changes are noticed."""

    def __init__(
        self,
        source: Any,
        dest: Any,
        conditions: Any = None,
        unless: Any = None,
        before: Any = None,
        after: Any = None,
        prepare: Any = None,
    ) -> None:
        super().__init__(source, dest, conditions, unless, _made(before), _made(after), _made(prepare))
        self.conditions = _List(self.conditions)


def _made(callbacks: Any) -> Any:
    """What stock makes a list of its own from, as an observed list; a list that was given stays itself."""
    return _List() if callbacks is None else listify(callbacks)


# --- plans -----------------------------------------------------------------------------------------------

_LISTS = (
    "prepare_event",
    "before_state_change",
    "after_state_change",
    "finalize_event",
    "on_exception",
    "on_final",
)
# What plans stand for.
_MACHINE_METHODS = (
    "callbacks",
    "callback",
    "resolve_callable",
    "get_state",
    "get_model_state",
    "set_state",
    "_process",
    "has_queue",
    *_LISTS,
)
_EVENT_METHODS = ("_trigger", "_process", "_is_valid_source")
_TRANSITION_METHODS = ("execute", "_change_state", "_eval_conditions")
_TRANSITION_DATA = ("source", "dest", "prepare", "conditions", "before", "after")
_STATE_METHODS = ("enter", "exit", "name", "value")
_STATE_DATA = ("on_enter", "on_exit", "final", "_name", "ignore_invalid_triggers")

_WATCHED = frozenset(
    {
        *_MACHINE_METHODS,
        *("_" + name for name in _LISTS),
        "_queued",
        "_transition_queue",
        "states",
        "send_event",
        "model_attribute",
    }
)


def _overrides(instance: object, stock: type, methods: Iterable[str], data: Iterable[str] = ()) -> bool:
    """Whether methods of `stock` are replaced, or its plain attributes made into something else."""
    own, cls = vars(instance), type(instance)
    if any(name in own or getattr(cls, name) is not getattr(stock, name) for name in methods):
        return True
    return cls is not stock and any(hasattr(cls, name) for name in data)


def _machine_fallback(machine: CompiledMachine) -> Fallback | None:
    own = vars(machine)
    # A queue with events left in it makes an unqueued machine raise.
    if own.get("_queued") or own.get("_transition_queue"):
        return Fallback.QUEUED
    if own.get("send_event"):
        return Fallback.SEND_EVENT
    if _overrides(machine, CompiledMachine, _MACHINE_METHODS):
        return Fallback.OVERRIDDEN
    return None


def _state_fallback(state: State, watch: _Watch) -> Fallback | None:
    if not isinstance(state, CompiledState) or not watch.claim(state):
        return Fallback.FOREIGN
    return Fallback.OVERRIDDEN if _overrides(state, CompiledState, _STATE_METHODS, _STATE_DATA) else None


def _transition_fallback(transition: CompiledTransition) -> Fallback | None:
    if _overrides(transition, CompiledTransition, _TRANSITION_METHODS, _TRANSITION_DATA):
        return Fallback.OVERRIDDEN
    return None


def _is_patched(condition: Condition) -> bool:
    return type(condition) is not Condition or "check" in vars(condition)


class _Step:
    """One transition ready to be taken; `refresh` keeps the fields up to date, also while it is taken."""

    __slots__ = (
        "__weakref__",
        "after",
        "after_all",
        "before",
        "before_all",
        "dest",
        "fallback",
        "simple",
        "transition",
        "value",
        "watch",
    )

    before: Any
    after: Any
    fallback: Fallback | None

    def __init__(self, transition: CompiledTransition, watch: _Watch) -> None:
        self.transition = transition
        self.watch = watch
        self.refresh()
        watch.dependents.add(self)

    def covered(self) -> bool:
        """Whether the step, as things are now, may be taken without stock's own methods."""
        return self.fallback is None

    def refresh(self) -> None:
        """Read transition, states and machine again."""
        transition, watch = self.transition, self.watch
        self.before_all, self.before = watch.before_state_change, transition.before
        self.after, self.after_all = transition.after, watch.after_state_change
        self.fallback = _transition_fallback(transition)
        # Whether the state is left without callbacks: all that is to be done is set, enter, final.
        self.simple = False
        if not transition.dest or self.fallback is not None:
            return
        source, dest = watch.states.get(transition.source), watch.states.get(transition.dest)
        for state in (source, dest):
            if state is not None:  # stock raises, when it comes to it
                self.fallback = self.fallback or _state_fallback(state, watch)
        if source is None or dest is None or self.fallback is not None:
            return
        self.value, self.dest = dest.value, dest
        self.simple = watch.usual and watch.knows_empty(source.on_exit)


class _Plan:
    """What an event does in one state."""

    __slots__ = ("fallback", "name", "state", "step")

    def __init__(self, state: object, name: str, fallback: Fallback | None, step: _Step | None) -> None:
        self.state = state
        self.name = name
        self.fallback = fallback
        # None: which transition is next depends on callbacks or conditions.
        self.step = step


_NO_PLAN = _Plan(object(), "", None, None)


class CompiledEvent(_StockName, Event):
    """An `Event` that carries out plans, and leaves to stock what they do not cover."""

    def __init__(self, name: str, machine: CompiledMachine) -> None:
        self._watch = machine._watch
        self._plan = _NO_PLAN  # of the state that the event was fired in last
        self._plans: dict[int, _Plan] = {}  # by id() of the state's value: Enum members are slow to hash
        super().__init__(name, machine)
        self.transitions = _Transitions(_List)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": _NO_PLAN, "_plans": {}}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "transitions" or name in _EVENT_METHODS:
            self.refresh()

    def refresh(self) -> None:
        """Forget all plans; they are made again when they are needed."""
        self._plan = _NO_PLAN
        self._plans.clear()

    def trigger(self, model: Any, *args: Any, **kwargs: Any) -> bool:
        """Take the first transition whose conditions hold, as `Event.trigger` does.

        Returns whether one did. Raises `MachineError` where no transition leads from the model's state by
        this event, and what callbacks raise (unless the machine has `on_exception`).
        """
        watch = self._watch
        plan = self._plan
        try:
            state = model.state if watch.usual else getattr(model, watch.model_attribute)
            if state is not plan.state:
                plan = self._plan_for(state)
        except Exception:  # stock meets it again, at its own time: a queued machine reads the state later
            return self._stock(Fallback.UNKNOWN_STATE, model, args, kwargs)
        if plan.fallback is not None or _records(_INFO):
            return self._stock(plan.fallback or Fallback.LOGGING, model, args, kwargs)
        silent = not args and not kwargs
        try:
            step = plan.step
            if step is None:
                chosen = self._choose(plan.name, model, args, kwargs)
                if not isinstance(chosen, _Step):
                    return chosen
                step = chosen

            # Both lists are bound before the first is walked, as in stock.
            before_all, before = step.before_all, step.before
            if before_all:
                self._call(before_all, model, args, kwargs)
            for func in before:
                kind = func.__class__
                if kind is not FunctionType and kind is not MethodType and isinstance(func, str):
                    func = self._resolve(func, model, args, kwargs)
                if silent:
                    func()  # costs half of the other
                else:
                    func(*args, **kwargs)

            if step.simple:
                dest = step.dest
                model.state = value = step.value
                reached = model.state
                if reached is not value:
                    self._check(reached)
                enter = dest.on_enter
                if enter or enter is None:  # stock fails on None
                    self._call(enter, model, args, kwargs)
                if dest.final:
                    self._call(watch.on_final, model, args, kwargs)
            elif step.transition.dest:
                self._change_state(step, model, args, kwargs)

            after, after_all = step.after, step.after_all
            for func in after:
                kind = func.__class__
                if kind is not FunctionType and kind is not MethodType and isinstance(func, str):
                    func = self._resolve(func, model, args, kwargs)
                if silent:
                    func()
                else:
                    func(*args, **kwargs)
            if after_all:
                self._call(after_all, model, args, kwargs)
            return True
        except BaseException:
            if not watch.on_exception:
                raise
            self._call(watch.on_exception, model, args, kwargs)
            return False
        finally:
            if watch.finalize_event:
                self._finalize(model, args, kwargs)

    # -- making plans

    def _plan_for(self, state: Any) -> _Plan:
        plan = self._plans.get(id(state))
        if plan is not None and plan.state is state:
            self._plan = plan
            return plan
        name = state.name if isinstance(state, Enum) else state
        known = self._watch.states.get(name)
        if known is not None and known.value is not state:
            # An equal string, or a member of another Enum: only the value of the state itself is kept.
            return self._make_plan(state, name)
        plan = self._make_plan(state, name)
        if known is not None:
            self._plan = self._plans[id(state)] = plan
        return plan

    def _make_plan(self, state: Any, name: Any) -> _Plan:
        watch = self._watch
        watch.dependents.add(self)
        fallback = watch.fallback or self._fallback(name)
        if fallback is not None:
            return _Plan(state, name, fallback, None)
        steps = [self._step(transition) for transition in self.transitions[name]]
        for step in steps:
            if step is None or any(map(_is_patched, step.transition.conditions)):
                return _Plan(state, name, Fallback.FOREIGN, None)
            if step.fallback is not None:
                return _Plan(state, name, step.fallback, None)
        # The first is always taken, if nothing is called to decide about it.
        only = steps[0] if steps else None
        if only is not None:
            transition = only.transition
            deciding = (watch.prepare_event, transition.prepare, transition.conditions)
            if not all(watch.knows_empty(funcs) for funcs in deciding):
                only = None
        return _Plan(state, name, None, only)

    def _fallback(self, name: Any) -> Fallback | None:
        watch = self._watch
        if _overrides(self, Event, _EVENT_METHODS):
            return Fallback.OVERRIDDEN
        if type(watch.states) is not _States or not watch.claim(watch.states):
            return Fallback.FOREIGN
        if type(self.transitions) is not _Transitions or not watch.claim(self.transitions):
            return Fallback.FOREIGN
        if name not in watch.states:
            return Fallback.UNKNOWN_STATE
        if name not in self.transitions:
            return Fallback.ILLEGAL
        candidates = self.transitions[name]
        if type(candidates) is not _List or not watch.claim(candidates):
            return Fallback.FOREIGN
        if watch.states[name].name != name:
            return Fallback.FOREIGN
        return _state_fallback(watch.states[name], watch)

    def _step(self, transition: Transition) -> _Step | None:
        """The step of a transition; None if it is not one of this machine's own."""
        if not isinstance(transition, CompiledTransition) or not self._watch.claim(transition):
            return None
        own = vars(transition)
        step = own.get("_step")
        if step is None:
            step = own["_step"] = _Step(transition, self._watch)
        return cast(_Step, step)

    # -- the rarer parts of a call

    def _choose(self, name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | bool:
        """The step to take, the first whose conditions hold; where there is none, the result of the call."""
        self._call(self._watch.prepare_event, model, args, kwargs)
        for transition in self.transitions[name]:
            step = self._step(transition)
            if step is None or step.fallback is not None:  # since the plan was made: by a callback just now
                if transition.execute(self._event_data(model, args, kwargs, transition)):
                    return True
                continue
            self._call(transition.prepare, model, args, kwargs)
            for condition in transition.conditions:
                if not self._holds(condition, transition, model, args, kwargs):
                    break
            else:
                return step
        return False

    def _holds(
        self,
        condition: Condition,
        transition: Transition,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        if _is_patched(condition):
            return condition.check(self._event_data(model, args, kwargs, transition))
        predicate = condition.func
        if isinstance(predicate, str):
            predicate = self._resolve(predicate, model, args, kwargs)
        holds: bool = predicate(*args, **kwargs) == condition.target
        return holds

    def _change_state(self, step: _Step, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The change of state with all that may belong to it."""
        transition: Any = step.transition
        machine = self.machine
        if not step.covered():  # since the plan was made: by a callback just now
            transition._change_state(self._event_data(model, args, kwargs, transition))
            return
        self._call(machine.get_state(transition.source).on_exit, model, args, kwargs)
        machine.set_state(transition.dest, model)
        self._check(getattr(model, machine.model_attribute))
        dest = machine.get_state(transition.dest)
        if not step.covered():
            dest.enter(self._event_data(model, args, kwargs, transition))
        else:
            self._call(dest.on_enter, model, args, kwargs)
        if dest.final:
            self._call(self._watch.on_final, model, args, kwargs)

    def _check(self, state: Any) -> None:
        """Stock looks the reached state up: what a property of the model made of it may be unknown."""
        if not isinstance(state, State):
            self.machine.get_state(state)

    def _call(self, funcs: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for func in funcs:
            if isinstance(func, str):
                func = self._resolve(func, model, args, kwargs)
            func(*args, **kwargs)

    def _resolve(
        self, name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        func: Callable[..., Any] = self.machine.resolve_callable(
            name, EventData(None, self, self.machine, model, args, kwargs)
        )
        return func

    def _event_data(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], transition: Transition | None = None
    ) -> EventData:
        event_data = EventData(self.machine.get_model_state(model), self, self.machine, model, args, kwargs)
        event_data.transition = transition
        return event_data

    def _finalize(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._call(self._watch.finalize_event, model, args, kwargs)
        except BaseException as error:  # stock swallows it, too
            _LOGGER.error(
                "%sWhile executing finalize callbacks a %s occurred: %s.",
                self.machine.name,
                type(error).__name__,
                str(error),
            )

    def _stock(self, reason: Fallback, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self._watch.fallbacks[reason] += 1
        return super().trigger(model, *args, **kwargs)


def _list_property(name: str) -> property:
    stock: property = getattr(Machine, name)

    def assign(machine: CompiledMachine, value: Any) -> None:
        setattr(machine, "_" + name, _made(value))

    return property(stock.fget, assign, doc=stock.__doc__)


class CompiledMachine(Machine):
    """A `transitions.Machine`, equal in behaviour, whose events are carried out by plans.

    Takes the arguments of `Machine`.
    """

    state_cls = CompiledState
    transition_cls = CompiledTransition
    event_cls = CompiledEvent

    prepare_event = _list_property("prepare_event")
    before_state_change = _list_property("before_state_change")
    after_state_change = _list_property("after_state_change")
    finalize_event = _list_property("finalize_event")
    on_exception = _list_property("on_exception")
    on_final = _list_property("on_final")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._watch = _Watch()
        super().__init__(*args, **kwargs)

    @property
    def fallbacks(self) -> Counter[Fallback]:
        """How many calls were left to stock's code so far, by reason; any other call went by its plan."""
        return self._watch.fallbacks

    def plain(self, event: str, source: str) -> CompiledTransition | None:
        """The transition that `event` takes in the state `source`, if nothing but callbacks belongs to it; else None.

        To take it then is: call what is in `before`, set the state, call what is in the destination's `on_enter`, call
        what is in `after`. That holds as long as neither the machine nor its transitions and states get callbacks or
        conditions of other kinds, and no callback is added by its name.
        """
        watch = self._watch
        step = cast(CompiledEvent, self.events[event])._plan_for(self.states[source].value).step
        if step is None or step.fallback is not None or not step.simple or _records(_INFO):
            return None
        more = (step.before_all, step.after_all, watch.on_exception, watch.finalize_event)
        if any(more) or (step.dest.final and watch.on_final):
            return None
        callbacks = (*step.before, *step.dest.on_enter, *step.after)
        return None if any(isinstance(func, str) for func in callbacks) else step.transition

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "states" and type(value) is OrderedDict and not value:
            value = _States()
        super().__setattr__(name, value)
        if name in _WATCHED:
            self._watch.reread(self)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in _WATCHED:
            self._watch.reread(self)

    def remove_transition(self, trigger: str, source: Any = "*", dest: Any = "*") -> None:
        """Remove a transition as `Machine.remove_transition` does."""
        event = self.events[trigger]
        super().remove_transition(trigger, source, dest)
        if type(event.transitions) is defaultdict:  # stock's new dict; nobody else has it
            event.transitions = _Transitions(_List, {k: _List(v) for k, v in event.transitions.items()})
