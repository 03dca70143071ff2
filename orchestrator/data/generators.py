"""Generators that objects own: found by walking attributes, seeded, and their states saved and set."""

import functools
import random
import sys
import types
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orchestrator.data.randomness import mixed
from orchestrator.errors import kind_of
from orchestrator.warning import warn

__all__ = [
    "Found",
    "find_consumed",
    "find_generators",
    "get_state",
    "seed_generator",
    "set_state",
    "warn_of_unseeded",
]

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        range,
        torch.Tensor,
        np.ndarray,
        np.generic,
    ),
    *(type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size),
)
_PLAIN = frozenset({*_LEAVES, torch.nn.Parameter})
"""Types whose objects are leaves, as is found out without asking after each of those."""
_NOT_FOLLOWED = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy"}
_BUILT_IN = (dict, list, tuple)
_BIG = 256
_SAMPLE = 16
_BUDGET = 20_000
_CONSUMED = ("__next__", "popleft", "get_nowait", "recv")


@dataclass
class Found:
    """What a walk found: generators by the path to them, those that can be seeded and those that cannot."""

    seedable: dict[str, Generator] = field(default_factory=dict)
    unseedable: dict[str, object] = field(default_factory=dict)
    complete: bool = True


def find_generators(roots: Mapping[str, object], *, outside: Collection[object] = ()) -> Found:
    """Every generator reachable from `roots` by attributes, containers, closures, and globals of their code.

    The global generators themselves are left out, and so is what lies behind an object of `outside`.
    Containers of more than 256 elements are taken to be data: their first 16 elements are looked at. A walk
    ends after 20,000 objects and is then not `complete`. No property is evaluated, and nothing is called.
    """
    found = Found()
    seen = {id(root) for root in outside}
    keep: list[object] = []  # so that an id is not given to another object meanwhile
    stack = [(path, root) for path, root in reversed(list(roots.items()))]
    classes: dict[type, _OfClass] = {}
    while stack:
        path, item = stack.pop()
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        keep.append(item)
        if len(keep) > _BUDGET:
            found.complete = False
            break
        if isinstance(item, _GENERATORS):
            if _is_global(item):
                continue
            (found.seedable if _can_be_seeded(item) else found.unseedable)[path] = item
        else:
            stack.extend(reversed(list(_parts(path, item, classes))))
    return found


def warn_of_unseeded(found: Found, role: str) -> None:
    """Say what of the data of `role` is not reproducible, if anything."""
    for path, generator in found.unseedable.items():
        warn(
            f"{role} data: {path}, {kind_of(generator)}, cannot be seeded, so what it draws is not "
            "reproducible and a resumed run will not be exact; use random.Random or np.random.default_rng instead"
        )
    if not found.complete:
        warn(
            f"{role} data: the data set is too large a graph of objects to be searched for generators to its end; "
            "one that was not found is not seeded, and a resumed run may then not be exact"
        )


def find_consumed(root: object, path: str) -> dict[str, object]:
    """What lies in `root`, itself included, that is used up by reading: iterators, open files, queues, sockets.

    Attributes and containers are followed, functions and objects of libraries are not; nothing is called.
    """
    found: dict[str, object] = {}
    seen: set[int] = set()
    stack = [(path, root)]
    while stack and len(seen) < _BUDGET:
        path, item = stack.pop()
        if isinstance(item, (*_LEAVES, *_GENERATORS)) or id(item) in seen:
            continue
        seen.add(id(item))
        if any(hasattr(type(item), name) for name in _CONSUMED):
            found[path] = item
        if isinstance(item, dict | list | tuple):
            stack.extend(reversed(list(_elements(path, item))))
        elif _is_followed(type(item).__module__):
            stack.extend((f"{path}.{name}", value) for name, value in getattr(item, "__dict__", {}).items())
    return found


def seed_generator(generator: Generator, path: str, seed: int) -> None:
    """Seed `generator`, found at `path`, from a batch's `seed`: each path has a stream of its own."""
    own = mixed(seed, zlib.crc32(path.encode()))
    if isinstance(generator, torch.Generator):
        generator.manual_seed(own)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(own).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(own >> 32)
    else:
        generator.seed(own)


def get_state(generator: Generator) -> Any:
    """The state of `generator`: a tensor, or plain values and arrays."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_state(generator: Generator, state: Any) -> None:
    """Set `generator` to a state that `get_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))


def _is_global(item: object) -> bool:
    """Whether `item` is one of the three global generators, which are dealt with as such."""
    return item is torch.default_generator or item is np.random.mtrand._rand or item is random._inst


def _can_be_seeded(generator: Generator) -> bool:
    """Whether seeding works, tried on the generator itself; its state is afterwards what it was."""
    try:
        state = get_state(generator)
        seed_generator(generator, "", 0)
        set_state(generator, state)
    except Exception:  # anything may come from a class of somebody else's, and it means no
        return False
    return True


_OfClass = list[tuple[str, object]]


def _of_class(kind: type) -> _OfClass:
    """What instances of a class have beside their `__dict__`, in the order of the class and its bases.

    Slots as their descriptors; values of classes that are not a library's, leaves left out.
    """
    found: _OfClass = []
    for base in kind.__mro__:
        if base.__module__ == "builtins":  # a function's slots are its module's globals, among others
            continue
        followed = _is_followed(base.__module__)
        for name, value in list(vars(base).items()):
            if isinstance(value, types.MemberDescriptorType):
                found.append((name, value))
            elif followed and not isinstance(inside := _underlying(value), _LEAVES):
                found.append((name, inside))
    return found


def _parts(path: str, item: object, classes: dict[type, _OfClass]) -> Iterator[tuple[str, object]]:
    if isinstance(item, _BUILT_IN):
        yield from _elements(path, item)
        if type(item) in _BUILT_IN:  # which have no attributes
            return
    elif isinstance(item, types.FunctionType):
        yield from _function_parts(path, item)
    elif isinstance(item, types.MethodType):
        yield f"{path}.__self__", item.__self__
        yield f"{path}.__func__", item.__func__
    elif isinstance(item, functools.partial):
        yield f"{path}.func", item.func
        yield f"{path}.args", item.args
        yield f"{path}.keywords", item.keywords
    yield from _attributes(path, item, classes)


def _elements(path: str, item: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, object]]:
    looked_at = len(item) if len(item) <= _BIG else _SAMPLE
    for key in list(item)[:looked_at] if isinstance(item, dict) else range(looked_at):
        if type(value := item[key]) not in _PLAIN:
            yield f"{path}[{key!r}]", value


def _attributes(path: str, item: object, classes: dict[type, _OfClass]) -> Iterator[tuple[str, object]]:
    """The attributes of an object and, unless its class is a library's, those of its class."""
    for name, value in list(getattr(item, "__dict__", {}).items()):
        if type(value) not in _PLAIN:
            yield f"{path}.{name}", value
    kind = type(item)
    if (of_class := classes.get(kind)) is None:
        of_class = classes[kind] = _of_class(kind)
    for name, value in of_class:
        if isinstance(value, types.MemberDescriptorType):
            try:
                yield f"{path}.{name}", value.__get__(item)
            except AttributeError:
                continue
        else:
            yield f"{path}.{name}", value


def _underlying(value: object) -> object:
    """The function inside a static method, a class method or a property."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def _function_parts(path: str, function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    if not _is_followed(function.__module__):
        return
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield f"{function.__module__}:{name}", function.__globals__[name]


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that `code` and the functions inside it may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_followed(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] not in _NOT_FOLLOWED
