"""What the data's code reads: by which names, and which values that can be changed in place."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from orchestrator.snapshot.fingerprints import memory_of
from orchestrator.snapshot.users_code import (
    SCALARS,
    attributes_read,
    functions_of,
    global_names,
    is_users,
    is_users_module,
    used_attributes,
    variables,
    variables_read,
)

__all__ = ["Readers"]

_FIRST = 64
_OBJECTS = 5_000


class Readers:
    """All that can be reached from `items`: attributes, and what functions enclose, default to and name globally.

    Found are the `codes` of the user's functions and all values that can be changed in place. `outside` is not
    entered. At most 5,000 objects are looked at, of each container the first 64.
    """

    def __init__(self, items: Iterable[object], outside: Iterable[object]) -> None:
        self.codes: list[types.CodeType] = []
        self._seen: dict[int, object] = {id(item): item for item in outside}
        self._values: set[Hashable] = set()
        left = deque(items)
        while left and len(self._seen) < _OBJECTS:
            item = left.popleft()
            if id(item) in self._seen or isinstance(item, SCALARS):
                continue
            self._seen[id(item)] = item
            self._values.add(_place(item))
            left.extend(self._next(item))

    def read(self, name: str, value: object, is_attribute: bool) -> bool:
        """Whether they read a variable or attribute of this `name`, or the `value`, or memory that it shares."""
        names = self._attributes if is_attribute else self._variables
        return name in names or (not isinstance(value, SCALARS) and _place(value) in self._values)

    @cached_property
    def _attributes(self) -> set[str]:
        return attributes_read(self.codes)

    @cached_property
    def _variables(self) -> set[str]:
        return variables_read(self.codes)

    def _next(self, item: Any) -> Iterator[Any]:
        if isinstance(item, Tensor | np.ndarray | np.generic | types.ModuleType):
            return
        if isinstance(item, dict):
            yield from islice(item.values(), _FIRST)
        elif isinstance(item, list | tuple | deque | set | frozenset):
            yield from islice(item, _FIRST)
        elif isinstance(item, types.MethodType):
            yield from (item.__func__, item.__self__)
        elif isinstance(item, functools.partial):
            yield from (item.func, *item.args, *item.keywords.values())
        elif isinstance(item, types.FunctionType):
            yield from self._of_function(item)
        elif isinstance(item, type):
            yield from _functions(item)
        else:
            yield from _functions(type(item))
            yield from variables(item).values()

    def _of_function(self, function: types.FunctionType) -> Iterator[Any]:
        yield getattr(function, "__wrapped__", None)
        if not is_users(function):
            return
        code = function.__code__
        self.codes.append(code)
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for name in global_names(code):
            value = function.__globals__.get(name)
            yield value
            if is_users_module(value):
                yield from (vars(value).get(used) for used in used_attributes(code))


def _functions(cls: type) -> Iterator[types.FunctionType]:
    for kind in cls.__mro__:
        if is_users(kind):
            yield from functions_of(kind)


def _place(value: object) -> Hashable:
    """Equal for values that are the same, or share memory."""
    if isinstance(value, Tensor):
        place = memory_of(value)
        return place[1] if isinstance(place, tuple) and place[0].type == "cpu" else place
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return int(value.__array_interface__["data"][0])
    return id(value)
