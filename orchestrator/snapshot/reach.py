"""What the user's functions, modules and callbacks refer to beside what is captured: the owners of such values."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from orchestrator.data.counters import is_plain
from orchestrator.snapshot.attributes import attributes
from orchestrator.snapshot.names import unique_submodules
from orchestrator.snapshot.users_code import (
    functions_of,
    global_names,
    has_users_variables,
    is_users,
    is_users_module,
    owner_of,
    set_attributes,
    stored_attributes,
    strings_in,
    used_attributes,
    variables,
)

__all__ = ["Owner", "Reach"]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)
_TENSORS_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OPTIMIZERS_OWN = frozenset({"step", "_opt_called", "_step_count"})
"""Set on an optimizer by torch's schedulers."""

_ELEMENTS = (Tensor, np.ndarray, np.generic)
_FIRST = 64
_OWNERS = 2_000
_ITEMS = 100
_DEPTH = 4


@dataclass(frozen=True)
class Owner:
    """Whose values are looked at: the global variables of a file, the attributes of an object, and so on.

    `label` begins the names of the values, `kind` says what they are: `a global variable of train`.
    """

    label: str
    kind: str
    read: Callable[[], Mapping[str, Any]]
    read_elsewhere: bool = False
    """Whether the values are there for code that was not looked at."""
    of_callback: bool = False
    """Whether the values are attributes of a callback."""
    cls: type | None = None
    """The class of the object whose attributes they are, which may have values for those that it lacks."""
    plain: bool = False
    """Whether there are but plain values, tensors and arrays among the values, and in them."""
    saved: Callable[[], object] | None = None
    """What the user's own code gives to checkpoints, some of the values perhaps among it."""


class Reach:
    """Everything that user's code names: by closures, globals, defaults, attributes; libraries are not entered.

    `outside`: objects that are dealt with elsewhere, neither entered nor owners.
    """

    def __init__(self, outside: Iterable[object]) -> None:
        self.owners: list[Owner] = []
        self.codes: list[types.CodeType] = []
        self._seen: dict[int, object] = {id(item): item for item in outside}
        self._globals: dict[int, set[str]] = {}
        self._saved: Callable[[], object] | None = (
            None  # what the callback saves whose attributes are followed
        )
        self._kept: Collection[str] = frozenset()  # the attributes that it names to do so

    @property
    def known(self) -> frozenset[int]:
        """The ids of what is outside, or an owner."""
        return frozenset(self._seen)

    def reads(self, attribute: str) -> bool:
        """Whether the code reads an attribute of that name."""
        return attribute in self._used

    def add_function(self, function: object) -> None:
        """A function of the user's, or anything that can be called."""
        self._follow(function, getattr(function, "__qualname__", type(function).__name__))

    def add_module(self, path: str, module: nn.Module, captured: Callable[[], Mapping[str, Any]]) -> None:
        """A model that is captured: what its attributes hold that is not among `captured`; its code, its hooks."""
        for name, part in unique_submodules(module).items():
            label = f"{path}.{name}" if name else path

            def left(part: nn.Module = part, name: str = name) -> dict[str, Any]:
                tree = captured()
                values, shared = tree["values"].get(name, {}), tree["shared"]
                full = f"{name}." if name else ""
                return {k: v for k, v in attributes(part) if k not in values and full + k not in shared}

            self._own(Owner(f"{label}.", "an attribute of a module", left))
            self._follow_class(type(part))
            self.add_hooks(part)
            for parameter in part._parameters.values():
                self.add_hooks(parameter)

        ever: set[str] = set()  # one whose last hook was taken away is still looked at

        def hooks() -> dict[str, Any]:
            found = {name: _users_hooks(part) for name, part in unique_submodules(module).items()}
            ever.update(name for name, of_part in found.items() if of_part)
            # In the modules' order, since generators are named by the first path that leads to them.
            return {f"{name}.hooks" if name else "hooks": of for name, of in found.items() if name in ever}

        self.owners.append(Owner(f"{path}.", "registered with a module or its parameters", hooks, True))

    def add_hooks(self, item: object) -> None:
        """The functions that are registered as hooks of a module, a parameter or an optimizer."""
        for hook in _hooks(item):
            self.add_function(hook)

    def add_callback(self, name: str, callback: object) -> None:
        """A callback of the user's: its code, and those of its attributes that its state_dict does not name."""
        cls = type(callback)
        if not is_users(cls):
            return
        self._follow_class(cls)
        kept = {"trainer", *_of_libraries(cls)}  # what a built-in one sets, it saves
        kind, saved = "an attribute of a callback that has no state_dict", None
        if is_users(_defining(cls, "state_dict")):
            kind, saved = "an attribute of a callback whose state_dict leaves it out", callback.state_dict  # type: ignore[attr-defined]
            kept |= _named_by(cls, {"state_dict", "load_state_dict"})
            self._saved, self._kept = saved, kept
            for value in variables(callback).values():
                self._follow(value, name)
            self._saved, self._kept = None, frozenset()

        def attributes_of() -> dict[str, Any]:
            return {key: value for key, value in variables(callback).items() if key not in kept}

        self._own(Owner(f"{name}.", kind, attributes_of, of_callback=True, cls=cls, saved=saved))

    def add_optimizer(self, optimizer: object) -> None:
        """An optimizer of the user's own class: its code, and what it keeps beside `state` and `param_groups`."""
        if not is_users(type(optimizer)):
            return
        self._follow_class(type(optimizer))
        kept = {*_OPTIMIZERS_OWN, *_of_libraries(type(optimizer))}

        def attributes_of() -> dict[str, Any]:
            return {key: value for key, value in variables(optimizer).items() if key not in kept}

        self._own(Owner(f"{type(optimizer).__name__}.", "an attribute of an optimizer", attributes_of))

    def add_scheduler(self, scheduler: object) -> None:
        """A scheduler: its code, if it is the user's, and functions that it was given and does not save."""
        self._follow_class(type(scheduler))
        for function in getattr(scheduler, "lr_lambdas", ()):
            if isinstance(function, types.FunctionType | types.MethodType | functools.partial):
                self.add_function(function)
            else:  # an object, whose attributes the scheduler saves
                self._follow_class(type(function))

    def add_data(self, item: object, counts: bool) -> None:
        """A data set, sampler or loader: those of its attributes that the code added before may change.

        It may by itself, or by a method of the data's that it names. What only the data's own code changes, such as
        a cache, is its own affair; so are plain values where it `counts` with them, which are kept with the order of
        its data, and there what `set_epoch` sets. But a list or array that is shuffled in place is not made anew
        with the order, where it `counts`.
        """
        given = _set_by(type(item), {"set_epoch"}) if counts else set()
        methods = _methods(type(item))
        own = _closed({name for name in methods if name.startswith("__") and name != "__init__"}, methods)

        def changeable() -> dict[str, Any]:
            named = [methods[name] for name in _closed(self._used & methods.keys() - own, methods) - own]
            sets = self._set.union(*map(set_attributes, named))
            uses = sets.union(self._used, *map(used_attributes, named))
            return {
                name: value
                for name, value in variables(item).items()
                if name not in given and (not counts and name in sets if is_plain(value) else name in uses)
            }

        kind = "an attribute of the data"
        self.owners.append(Owner(f"{type(item).__name__}.", kind, changeable, True))
        if counts and not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
            held = {name: (value, size) for name, value in variables(item).items() if (size := _size(value))}

            def shuffled() -> dict[str, Any]:
                return {
                    name: value
                    for name, value in variables(item).items()
                    if name in held and held[name][0] is value and held[name][1] == _size(value)
                }

            self.owners.append(Owner(f"{type(item).__name__}.", kind, shuffled, True))
        elif "__call__" in methods and "__getitem__" not in methods:
            # What collates items sees batch after batch: all that it keeps is of those before.
            self.owners.append(
                Owner(f"{type(item).__name__}.", kind, functools.partial(variables, item), True)
            )

    def add_values(self, item: object) -> None:
        """A list, dict, tensor or array that was given as data: the plain values, tensors and arrays in it."""

        def read() -> dict[str, Any]:
            return {type(item).__name__: _values(item, 0)}

        self.owners.append(Owner("", "given as data", read, True, plain=True))

    @cached_property
    def _set(self) -> set[str]:
        """The names of the attributes that the code sets, of whatever."""
        return set().union(*map(set_attributes, self.codes))

    @cached_property
    def _used(self) -> set[str]:
        """The names of those that it reads; what it reads it may change, if it can be changed."""
        return set().union(*map(used_attributes, self.codes))

    def _own(self, owner: Owner) -> None:
        if len(self.owners) < _OWNERS:
            self.owners.append(owner)
            for name, value in owner.read().items():
                self._follow(value, f"{owner.label}{name}")

    def _follow(self, item: Any, label: str) -> None:
        if id(item) in self._seen or isinstance(item, types.ModuleType):
            return
        if isinstance(item, dict | list | tuple | deque | set | frozenset):
            self._seen[id(item)] = item  # it may contain itself
            self._follow_all(item.values() if isinstance(item, dict) else item, label)
            del self._seen[id(item)]  # its fingerprint is part of its holder's
        elif isinstance(item, types.MethodType):
            self._follow(item.__func__, label)
            self._follow(item.__self__, type(item.__self__).__name__)
        elif isinstance(item, functools.partial):
            self._follow_all([item.func, *item.args, *item.keywords.values()], label)
        elif isinstance(item, types.FunctionType):
            self._follow_function(item)
        elif isinstance(inner := getattr(item, "__wrapped__", None), types.FunctionType):
            self._follow_function(inner)
        elif isinstance(item, type):
            self._follow_class(item)
        elif has_users_variables(item):
            self._follow_class(type(item))
            if not isinstance(item, nn.Module):  # whose fingerprint is its holder's
                self._seen[id(item)] = item
                kind = f"an attribute of a {type(item).__name__}"
                read = functools.partial(_variables_but, item, self._kept)
                self._own(Owner(f"{label}.", kind, read, cls=type(item), saved=self._saved))

    def _follow_all(self, items: Iterable[Any], label: str) -> None:
        for item in islice(items, _FIRST):
            self._follow(item, label)

    def _follow_function(self, function: types.FunctionType) -> None:
        if not is_users(function) or id(function) in self._seen:
            return
        self._seen[id(function)] = function
        code, name = function.__code__, function.__qualname__.rpartition("<locals>.")[2]
        self.codes.append(code)
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self._own(
                    Owner("", f"a variable that {name} encloses", functools.partial(_content, variable, cell))
                )
        if function.__defaults__ or function.__kwdefaults__:
            self._own(Owner("", f"a default argument of {name}", functools.partial(_defaults, function)))
        self._own(Owner(f"{name}.", "an attribute of a function", lambda: vars(function)))
        self._follow_globals(function)
        if isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
            self._follow_function(inner)

    def _follow_globals(self, function: types.FunctionType) -> None:
        namespace, used = function.__globals__, global_names(function.__code__)
        self._add_names(namespace, used)
        for name in used:  # what it uses of another file of the user's, as `file.name`
            module = namespace.get(name)
            if is_users_module(module):
                named = used_attributes(function.__code__) | set_attributes(function.__code__)
                self._add_names(vars(module), named & vars(module).keys())

    def _add_names(self, namespace: dict[str, Any], used: set[str]) -> None:
        names = self._globals.get(id(namespace))
        builtins = namespace.get("__builtins__", {})
        known = builtins if isinstance(builtins, dict) else vars(builtins)
        used = {name for name in used if name in namespace or name not in known}
        if names is None:
            names = self._globals[id(namespace)] = set()
            file = namespace.get("__name__", "?")
            self.owners.append(
                Owner(
                    "",
                    f"a global variable of {file}",
                    lambda: {name: namespace[name] for name in sorted(names) if name in namespace},
                )
            )
        new = sorted(used - names)
        names.update(new)
        for name in new:
            if name in namespace:
                self._follow(namespace[name], name)

    def _follow_class(self, cls: type) -> None:
        for kind in cls.__mro__:
            if not is_users(kind) or id(kind) in self._seen:
                continue
            self._seen[id(kind)] = kind
            for function in functions_of(kind):
                self._follow_function(function)
            self._own(
                Owner(f"{kind.__name__}.", "an attribute of a class", functools.partial(_of_class, kind))
            )


def _hooks(item: object) -> Iterator[Any]:
    if isinstance(item, Tensor):
        found = [getattr(item, name, None) for name in _TENSORS_HOOKS]
    else:
        held = getattr(item, "__dict__", {})
        found = [held.get(name) for name in _HOOKS]
    for hooks in found:
        if hooks:
            yield from hooks.values()


def _users_hooks(part: nn.Module) -> list[Any]:
    """The hooks of a module and its parameters that the user's code has registered."""
    return [
        hook
        for item in (part, *part._parameters.values())
        for hook in _hooks(item)
        if is_users(owner_of(hook))
    ]


def _values(item: Any, depth: int) -> Any:
    """A copy of the containers of `item`, with nothing in place of objects."""
    if isinstance(item, _ELEMENTS) or is_plain(item):
        return item
    if depth > _DEPTH:
        return None
    if isinstance(item, (list, tuple)):
        return [len(item), *[_values(part, depth + 1) for part in item[:: max(1, len(item) // _ITEMS)]]]
    if isinstance(item, dict):
        return {key: _values(item[key], depth + 1) for key in islice(item, _ITEMS)}
    return None


def _size(value: object) -> tuple[int, ...]:
    """The shape of a list, array or tensor of values, of lists of values too; empty for anything else."""
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, list) and all(is_plain(v) or isinstance(v, list | tuple) for v in value[:_FIRST]):
        return (len(value),) if value else ()
    return ()


def _methods(cls: type) -> dict[str, types.CodeType]:
    """The code of the methods that are the user's, by name."""
    kinds = [kind for kind in reversed(cls.__mro__) if is_users(kind)]
    return {function.__name__: function.__code__ for kind in kinds for function in functions_of(kind)}


def _closed(names: set[str], methods: Mapping[str, types.CodeType]) -> set[str]:
    """The methods of these names, and those that they name in turn."""
    found: set[str] = set()
    left = names & methods.keys()
    while left:
        found |= left
        left = set().union(*(used_attributes(methods[name]) for name in left)) & methods.keys() - found
    return found


def _named_by(cls: type, names: set[str]) -> set[str]:
    """The attributes that the methods of these names read, set, or have the names of as strings."""
    closed = _closed(names, _methods(cls))
    codes = [
        function.__code__
        for kind in cls.__mro__
        if is_users(kind)
        for function in functions_of(kind)
        if function.__name__ in closed
    ]
    return set().union(*(used_attributes(c) | set_attributes(c) | strings_in(c) for c in codes))


def _set_by(cls: type, names: set[str]) -> set[str]:
    """The attributes that the methods of these names set."""
    methods = _methods(cls)
    return set().union(*(set_attributes(methods[name]) for name in _closed(names, methods)))


def _variables_but(item: object, kept: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in variables(item).items() if name not in kept}


def _content(name: str, cell: types.CellType) -> dict[str, Any]:
    try:
        return {name: cell.cell_contents}
    except ValueError:  # not assigned yet
        return {}


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    values = function.__defaults__ or ()
    code = function.__code__
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _of_class(cls: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(cls).items()
        if not (name.startswith("__") or callable(value) or hasattr(value, "__get__"))
    }


def _of_libraries(cls: type) -> set[str]:
    """The attributes that those of its bases set which are not the user's."""
    return set().union(*(stored_attributes(kind) for kind in cls.__mro__ if not is_users(kind)))


def _defining(cls: type, name: str) -> Any:
    return next((kind for kind in cls.__mro__ if name in vars(kind)), None)
