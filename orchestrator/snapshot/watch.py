"""Watch: finds state that changes while training and is in no checkpoint, and says so once by name."""

from __future__ import annotations

import functools
import io
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.snapshot.attributes import Built, capture_attributes, without_standing
from orchestrator.snapshot.fingerprints import NOTHING, Fingerprints, is_of_code, memory_of
from orchestrator.snapshot.names import registered
from orchestrator.snapshot.reach import Owner, Reach
from orchestrator.snapshot.readers import Readers
from orchestrator.snapshot.users_code import SCALARS, has_users_variables, is_users, only_written, variables

__all__ = ["Watch", "parts_of"]

_MANY = 1_000
_CLOCKS = (time.time, time.perf_counter, time.monotonic)


class Watch:
    """Looks at what the user's code refers to and no checkpoint has.

    `functions`: the user's, such as forward and hooks. `modules` (model and loss) and `hooked` (optimizers): what is
    captured, whose code and remaining attributes are looked at. `callbacks` by name. `outside`: objects that
    are taken care of elsewhere: schedulers, the trainer. `data`: loaders, data sets and samplers; of these too, but for
    attributes that the code looked at has to do with.

    Nothing is done between `begin` and `look`. A change is not told where the code, the data's too, only ever adds
    to the value, as to a log, or where it is the reading of a clock.
    """

    def __init__(
        self,
        *,
        functions: Collection[object],
        modules: Mapping[str, nn.Module],
        hooked: Collection[object],
        callbacks: Mapping[str, object],
        outside: Collection[object],
        data: Collection[object] = (),
    ) -> None:
        self._modules = modules
        self._data = data
        self._schedulers = [item for item in outside if isinstance(item, LRScheduler)]
        self.outside = [*outside, *data, *callbacks.values(), *hooked]
        for module in modules.values():
            self.outside += module.modules()
        self._functions = functions
        self._hooked = hooked
        self._callbacks = callbacks
        self._told: set[tuple[str, str]] = set()
        self._taken: dict[str, dict[str, Any]] = {}
        self._before: list[dict[str, Hashable]] = []
        self._reach = Reach(())
        self._began: list[float] = []
        self._read: list[Mapping[str, Any]] = []
        """The values of each owner, as they were looked at last; until `roots` has used them."""
        self._readers: Readers | None = None
        self._only_written: Callable[[str], bool] = lambda name: False

    @property
    def owners(self) -> list[Owner]:
        """Whose values are looked at."""
        return self._reach.owners

    def reads(self, attribute: str) -> bool:
        """Whether the user's code reads an attribute of that name, of whatever."""
        return self._reach.reads(attribute)

    def attributes_of(self, path: str, built: Built) -> dict[str, Any]:
        """What `capture_attributes` gives of a module of that name, as it was looked at last."""
        return without_standing(self._taken[path], built)

    def roots(self) -> dict[str, object]:
        """By name, every value that generators may be reached from; those of all the user's callbacks too.

        Those of owners are as they were looked at just before.
        """
        found: dict[str, object] = {}
        read, self._read = self._read or self._read_all(), []
        for owner, values in zip(self.owners, read, strict=True):
            for name, value in () if owner.plain else values.items():
                found.setdefault(owner.label + name, value)
        for key, callback in self._callbacks.items():
            if is_users(type(callback)):
                found.update({f"{key}.{name}": value for name, value in variables(callback).items()})
        return found

    def begin(self) -> None:
        """Find what the code refers to, and remember how it is now."""
        self._reach = reach = Reach(self.outside)
        self._take()
        for path, module in self._modules.items():
            reach.add_module(path, module, self._captured_of(path))
        for name, callback in self._callbacks.items():
            reach.add_callback(name, callback)
        for item in self._hooked:
            reach.add_hooks(item)
            reach.add_optimizer(item)
        for function in self._functions:
            reach.add_function(function)
        for scheduler in self._schedulers:
            reach.add_scheduler(scheduler)
        for item in self._data:
            if type(item) not in _PLAIN_DATA:
                reach.add_data(item, _counts(item))
        for item in _outermost(self._data):
            reach.add_values(item)
        self._readers = None
        self._only_written = functools.cache(functools.partial(only_written, codes=reach.codes))
        self._before = [now for _, now in self._fingerprints()]
        self._began = [clock() for clock in _CLOCKS]

    def look(self) -> list[str]:
        """What has changed since `begin` and was not told yet: a message for each."""
        self._take()
        self._readers = None
        messages = []
        for owner, before, (values, now) in zip(self.owners, self._before, self._fingerprints(), strict=True):
            for name in values:
                place = owner.kind, owner.label + name
                if place in self._told:
                    continue
                if _is_blind(values[name]):
                    self._told.add(place)
                    messages.append(
                        _BLIND.format(name=place[1], kind=owner.kind, type=type(values[name]).__name__)
                    )
                elif message := self._change(owner, name, values[name], before, now):
                    self._told.add(place)
                    messages.append(message.format(name=place[1], kind=owner.kind))
        return messages

    def _change(
        self,
        owner: Owner,
        name: str,
        value: Any,
        before: Mapping[str, Hashable],
        now: Mapping[str, Hashable],
    ) -> str | None:
        """What there is to tell of a value, if there is."""
        is_new, is_time = name not in before and not hasattr(owner.cls, name), self._is_time(value)
        is_code, was_code = is_of_code(now[name]), is_of_code(before.get(name, NOTHING))
        if is_new and (is_time or (owner.of_callback and (is_code or now[name] is NOTHING))):
            return _MISSING if self._is_read(owner, name, value) else None
        if is_time or now[name] == before.get(name, NOTHING) or (now[name] is NOTHING and not was_code):
            return None
        if owner.saved is not None and _is_saved(name, value, owner.saved):
            return None
        return _CHANGED if self._is_read(owner, name, value) else None

    def _is_read(self, owner: Owner, name: str, value: Any) -> bool:
        return (
            owner.read_elsewhere
            or not self._only_written(name)
            or self._readers_now().read(name, value, is_attribute=bool(owner.label))
        )

    def _readers_now(self) -> Readers:
        if self._readers is None:
            data = {id(item) for item in self._data}
            self._readers = Readers(self._data, [item for item in self.outside if id(item) not in data])
        return self._readers

    def _is_time(self, value: Any) -> bool:
        if not isinstance(value, float):
            return False
        return any(began <= value <= clock() for began, clock in zip(self._began, _CLOCKS, strict=True))

    def _captured_of(self, path: str) -> Callable[[], dict[str, Any]]:
        return lambda: self._taken[path]

    def _take(self) -> None:
        self._taken = {path: capture_attributes(module) for path, module in self._modules.items()}

    def _fingerprints(self) -> list[tuple[Mapping[str, Any], dict[str, Hashable]]]:
        """The values of each owner, and their fingerprints."""
        fingerprints = Fingerprints(set(map(memory_of, self._tensors())), self._reach.known)
        self._read = self._read_all()
        return [(values, {name: fingerprints.of(v) for name, v in values.items()}) for values in self._read]

    def _read_all(self) -> list[Mapping[str, Any]]:
        return [owner.read() for owner in self.owners]

    def _tensors(self) -> Iterator[Tensor]:
        """Those that are captured, wherever the user's code has them."""
        for module in self._modules.values():
            yield from registered(module)
        for optimizer in self._hooked:
            for group in getattr(optimizer, "param_groups", ()):
                yield from group["params"]


def _counts(item: object) -> bool:
    """Whether plain values of a sampler or an iterable data set are kept with the order of its data."""
    return hasattr(item, "__iter__") and not type(item).__module__.startswith("torch.")


def _outermost(data: Iterable[object]) -> Iterator[object]:
    """The plain containers, tensors and arrays of `data` that lie in none that comes before."""
    inside: set[int] = set()
    for item in data:
        if isinstance(item, list | tuple | dict | Tensor | np.ndarray):
            if id(item) not in inside:
                yield item
            if not isinstance(item, Tensor | np.ndarray):
                inside.update(map(id, item.values() if isinstance(item, dict) else item))


_PLAIN_DATA = (list, tuple, Tensor, np.ndarray)
"""What has no attributes of its own; the values in it are looked at."""
_INSIDE = ("dataset", "datasets", "sampler", "batch_sampler", "collate_fn", "_schedulers")


def parts_of(items: Iterable[object]) -> list[object]:
    """Loaders and schedulers with the data sets, samplers and schedulers inside them."""
    found: dict[int, object] = {}
    left = list(items)
    while left:
        item = left.pop()
        if id(item) in found or item is None:
            continue
        found[id(item)] = item
        if isinstance(item, list | tuple):
            left += item if len(item) <= _MANY else ()
        elif not isinstance(item, Tensor):
            left += [getattr(item, name, None) for name in _INSIDE]
    return list(found.values())


def _is_blind(value: object) -> bool:
    """Whether it has a position that cannot be seen."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and not is_users(type(value))


def _is_saved(name: str, value: object, saved: Callable[[], object]) -> bool:
    """Whether `value`, or a copy of it, is among what is saved; a plain one by its name."""
    try:
        state = saved()
    except Exception:  # the capture, which calls it too, will raise it
        return False
    fingerprints = Fingerprints((), (), versions=False)
    mine = {fingerprints.of(plain) for plain in _as_saved(value)} - {NOTHING}
    left, looked_at = deque[tuple[object, Any]]([("", state)]), 0
    while left and looked_at < _MANY:
        key, item = left.popleft()
        looked_at += 1
        if (key == name or not isinstance(value, SCALARS)) and (
            item is value or any(fingerprints.of(plain) in mine for plain in _as_saved(item))
        ):
            return True
        if isinstance(item, dict):
            left.extend(item.items())
        elif isinstance(item, list | tuple):
            left.extend(("", part) for part in item)
    return False


def _as_saved(value: Any) -> Iterator[Any]:
    """The value, and what it may be made into to be saved."""
    yield value
    if isinstance(value, Tensor | np.ndarray | np.generic) and np.prod(value.shape) == 1:
        yield value.item()
    elif hasattr(value, "state_dict"):
        yield value.state_dict()
    elif has_users_variables(value):
        yield variables(value)


_ADVICE = "Keep it in a buffer or a plain attribute of the model, or in a Callback with state_dict and load_state_dict."
_CHANGED = (
    "{name}, {kind}, has changed since the training began and is in no checkpoint: a resumed run begins with its "
    f"first value; if the training depends on it, it will not be exact. {_ADVICE}"
)
_MISSING = (
    "{name}, {kind}, was first set while training and is in no checkpoint: a resumed run does not have it until the "
    "code sets it again, and fails where it is read before. Give it a value before the training begins, such as in "
    "__init__ or on_train_begin."
)
_BLIND = (
    "{name}, {kind}, is a {type}, whose position is in no checkpoint: a resumed run begins it anew, so it will not be "
    "exact. Make it from numbers that are kept, such as trainer.batches, or give the data by train_loader."
)
