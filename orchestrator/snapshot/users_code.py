"""What the user's code is, as opposed to libraries', and which names it uses in which way."""

from __future__ import annotations

import argparse
import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

__all__ = [
    "SCALARS",
    "attributes_read",
    "functions_of",
    "global_names",
    "has_users_variables",
    "is_users",
    "is_users_module",
    "only_written",
    "owner_of",
    "set_attributes",
    "stored_attributes",
    "strings_in",
    "used_attributes",
    "variables",
    "variables_read",
]

SCALARS = (bool, int, float, complex, str, bytes, type(None))

_LIBRARIES = frozenset(
    {"torch", "numpy", "torchvision", "torchmetrics", "mlflow", "orchestrator", "states", "tracking"}
)
_FOLDERS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
_INSTALLED = ("site-packages", "dist-packages")

_READS = frozenset(
    {
        *("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_ATTR", "LOAD_METHOD"),
        *("LOAD_FROM_DICT_OR_DEREF", "LOAD_FROM_DICT_OR_GLOBALS"),
    }
)
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")
_ADDS = frozenset({"append", "appendleft", "extend", "add", "write", "writerow"})
_NOISE = frozenset({"CACHE", "EXTENDED_ARG", "NOP"})


def is_users(item: Any) -> bool:
    """Whether a class or function is the user's own, by the file of its module."""
    module = getattr(item, "__module__", None)
    return isinstance(module, str) and _is_users_module(module)


@lru_cache(4096)
def _is_users_module(name: str) -> bool:
    if name == "__main__":
        return True
    top = name.partition(".")[0]
    if top in _LIBRARIES or top in sys.stdlib_module_names:
        return False
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:  # made by exec, or in a notebook; or built in
        return name not in sys.builtin_module_names
    installed = any(folder in file for folder in _INSTALLED)
    return not installed and not file.startswith(_FOLDERS)


def has_users_variables(item: object) -> bool:
    """Whether the attributes of `item` are the user's affair: an object of the user's classes, or a namespace."""
    return isinstance(item, types.SimpleNamespace | argparse.Namespace) or is_users(type(item))


def owner_of(hook: Any) -> Any:
    """The function that is called by `hook`, or the class of the object that it is a method of."""
    while isinstance(hook, functools.partial) or hasattr(hook, "__wrapped__"):
        hook = hook.func if isinstance(hook, functools.partial) else hook.__wrapped__
    return type(hook.__self__) if isinstance(hook, types.MethodType) else hook


def is_users_module(item: object) -> bool:
    """Whether it is a module, and the user's own."""
    return isinstance(item, types.ModuleType) and _is_users_module(item.__name__)


def variables(item: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too."""
    found = dict(getattr(item, "__dict__", {}))
    for name, slot in _slots(type(item)):
        try:
            found[name] = slot.__get__(item)
        except AttributeError:
            continue
    return found


def _slots(cls: type) -> list[tuple[str, types.MemberDescriptorType]]:
    if cls not in _known_slots:  # torch's classes have hundreds of attributes to look through
        _known_slots[cls] = [
            (name, value)
            for kind in cls.__mro__
            if kind.__module__ != "builtins"
            for name, value in vars(kind).items()
            if isinstance(value, types.MemberDescriptorType)
        ]
    return _known_slots[cls]


_known_slots: WeakKeyDictionary[type, list[tuple[str, types.MemberDescriptorType]]] = WeakKeyDictionary()


def functions_of(cls: type) -> Iterator[types.FunctionType]:
    """The functions that a class itself defines, those of properties and class methods too."""
    for value in vars(cls).values():
        for found in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            if isinstance(found, types.FunctionType):
                yield found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@lru_cache(1024)
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(i for part in _codes(code) for i in dis.get_instructions(part) if i.opname not in _NOISE)


def global_names(code: types.CodeType) -> set[str]:
    """The global variables that `code`, and functions within it, read or write."""
    return {i.argval for i in _instructions(code) if i.opname in _GLOBALS}


def used_attributes(code: types.CodeType) -> set[str]:
    """The attributes, of whatever, that `code` reads."""
    return {i.argval for i in _instructions(code) if i.opname in _ATTRIBUTES}


def set_attributes(code: types.CodeType) -> set[str]:
    """The attributes, of whatever, that `code` sets."""
    return {i.argval for i in _instructions(code) if i.opname == "STORE_ATTR"}


def strings_in(code: types.CodeType) -> set[str]:
    """The constants of `code` that are strings, those in tuples too."""
    found: set[str] = set()
    for part in _codes(code):
        for constant in part.co_consts:
            items = constant if isinstance(constant, tuple | frozenset) else (constant,)
            found.update(item for item in items if isinstance(item, str))
    return found


def stored_attributes(cls: type) -> set[str]:
    """The attributes that the functions of `cls` set."""
    return set().union(*(set_attributes(function.__code__) for function in functions_of(cls)))


def _read(
    codes: Iterable[types.CodeType],
) -> Iterator[tuple[dis.Instruction | None, dis.Instruction]]:
    """Where `codes` read something other than to add to it, each with the instruction before."""
    for found in map(_instructions, codes):
        for here, instruction in enumerate(found):
            if instruction.opname in _READS and not _only_adds(found, here):
                yield (found[here - 1] if here else None), instruction


def variables_read(codes: Iterable[types.CodeType]) -> set[str]:
    """The variables that `codes` read, as such or as `file.name`, other than to add to them."""
    return {
        i.argval
        for before, i in _read(codes)
        if i.opname not in _ATTRIBUTES or (before is not None and before.opname in _GLOBALS)
    }


def attributes_read(codes: Iterable[types.CodeType]) -> set[str]:
    """The attributes, of whatever, that `codes` read other than to add to them."""
    return {i.argval for _, i in _read(codes) if i.opname in _ATTRIBUTES}


def only_written(name: str, codes: Iterable[types.CodeType]) -> bool:
    """Whether all that `codes` do with the variable or attribute `name` is to add to it, as to a log."""
    return not any(_reads(name, code) for code in codes)


def _reads(name: str, code: types.CodeType) -> bool:
    if any(name in part.co_consts for part in _codes(code)):  # by getattr
        return True
    found = _instructions(code)
    is_argument = name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(
        _loads(instruction, name, is_argument) and not _only_adds(found, here)
        for here, instruction in enumerate(found)
    )


def _only_adds(found: Sequence[dis.Instruction], here: int) -> bool:
    following = found[here + 1 : here + 40]
    return _adds(following[0]) or _sets_an_item(following) or _adds_to_an_item(following)


def _loads(instruction: dis.Instruction, name: str, is_argument: bool) -> bool:
    if is_argument and instruction.opname.startswith("LOAD_FAST"):
        loaded = instruction.argval  # two names in one instruction of later Pythons
        return name == loaded or (isinstance(loaded, tuple) and name in loaded)
    return instruction.opname in _READS and bool(instruction.argval == name)


def _adds(after: dis.Instruction) -> bool:
    return after.opname in _ATTRIBUTES and after.argval in _ADDS


def _adds_to_an_item(following: Sequence[dis.Instruction]) -> bool:
    """Whether what was just loaded is the container of `container[key].append(value)`, of a simple key."""
    if len(following) < 3 or not following[0].opname.startswith("LOAD_"):
        return False
    found = following[1]
    is_item = found.opname == "BINARY_SUBSCR" or (found.opname == "BINARY_OP" and found.argrepr == "[]")
    return is_item and following[0].opname not in _ATTRIBUTES and _adds(following[2])


def _sets_an_item(following: Iterable[dis.Instruction]) -> bool:
    """Whether what was just loaded is the container of `container[key] = value`."""
    above = 0  # what lies on the stack above it
    for instruction in following:
        if instruction.opname == "STORE_SUBSCR":
            return above == 1
        if "JUMP" in instruction.opname or above < 0:
            return False
        above += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
    return False
