"""Plain attributes of modules: state that is neither parameter nor buffer, such as a carried hidden state."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.metric_states import has_states
from orchestrator.snapshot.names import registered, unique_submodules
from orchestrator.snapshot.tensor_entries import array_as_tensor, identity, refusal
from orchestrator.snapshot.tensors import overwrite, replica

__all__ = [
    "Built",
    "attribute_differences",
    "attributes",
    "capture_attributes",
    "is_torchs",
    "other_constants",
    "restore_attributes",
    "without_standing",
]

Tree = dict[str, Any]
Scalars = Mapping[str, Mapping[str, Any]]

_BOOKKEEPING = frozenset(vars(nn.Module()))
_SCALARS = (NoneType, bool, int, float, complex, str, bytes)
_PLAIN = frozenset({*_SCALARS, bytearray, range, torch.Size, torch.dtype})
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_SEQUENCES = (list, tuple, deque, set, frozenset)
_FACTORIES = (None, bool, dict, float, int, list, set, str, tuple)
_DEPTH = 20


@dataclass(frozen=True)
class Built:
    """The attributes of a module's parts as the script made them, from before any training.

    `scalars` are values by path and name; they tell what training has changed from what the script says.
    `names` are all that were there.
    """

    scalars: dict[str, dict[str, Any]]
    names: dict[str, frozenset[str]]

    @classmethod
    def of(cls, module: nn.Module) -> Built:
        """Those of `module` and its parts as they are now."""
        parts = unique_submodules(module)
        return cls(
            {
                path: {k: v for k, v in attributes(part) if type(v) in _SCALARS}
                for path, part in parts.items()
            },
            {path: frozenset(vars(part)) for path, part in parts.items()},
        )

    def adopt(self, saved: Scalars) -> None:
        """Measure by the values that a checkpoint's training was built with from now on."""
        for path, values in saved.items():
            self.scalars.setdefault(path, {}).update(values)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What stands in `module` beside torch's bookkeeping; of torch's own modules public names only.

    Nothing of a metric in torchmetrics' manner, whose states are captured as such.
    """
    if has_states(module):
        return
    private = not is_torchs(module)
    for name, value in vars(module).items():
        if name not in _BOOKKEEPING and (private or not name.startswith("_")):
            yield name, value


def is_torchs(module: nn.Module) -> bool:
    """Whether its class is one of torch's, parametrized or not."""
    for kind in type(module).__mro__:
        if kind.__module__ != "torch.nn.utils.parametrize":
            return kind.__module__.partition(".")[0] == "torch"
    return False


def capture_attributes(module: nn.Module, built: Built | None = None) -> Tree:
    """The attributes of `module` and its parts that are plain data and tensors of their own.

    `values` by path and name; tensors are references. `shared`: an attribute that is the same list, dict or
    tensor as an earlier one, by both names. `marks`: which of an attribute's tensors, in order, are on the `host`
    though the module is not, and which require a `grad`.

    Left out is whatever cannot be restored exactly: objects, functions, modules, what shares memory with
    parameters and buffers or, written in place, with other attributes; devices; and strings that stand as `built`,
    which tell folders and devices of this machine.
    """
    found = _Search(module, built)
    overlapping = found.overlapping()
    tree: Tree = {"values": {}, "shared": {}, "marks": {}}
    first: dict[int, str] = {}
    for (path, name), value in found.values.items():
        if type(value) in _SCALARS:  # nearly all there is
            tree["values"].setdefault(path, {})[name] = value
            continue
        if (path, name) in overlapping:
            continue
        full = _joined(path, name)
        if not isinstance(value, tuple) and first.setdefault(id(value), full) != full:
            tree["shared"][full] = first[id(value)]
            continue
        tree["values"].setdefault(path, {})[name] = _mapped(value, Tensor.detach)
        marks = _marks(value, found.parts[path], module)
        if marks:
            tree["marks"][full] = marks
    return tree


def without_standing(tree: Tree, built: Built) -> Tree:
    """What `capture_attributes` gives with `built`, of what it has given without."""
    values = {
        path: {name: value for name, value in of_part.items() if not _stands(built, path, name, value)}
        for path, of_part in tree["values"].items()
    }
    return {**tree, "values": {path: of_part for path, of_part in values.items() if of_part}}


class _Search:
    """The attributes of all parts of a module that can be captured, each looked at by itself."""

    def __init__(self, module: nn.Module, built: Built | None) -> None:
        self._module = module
        self.parts = parts = unique_submodules(module)
        self.values = {
            (path, name): value
            for path, part in parts.items()
            for name, value in attributes(part)
            if self._is_data(value, 0) and not _stands(built, path, name, value)
        }

    @cached_property
    def _registered(self) -> set[object]:
        """The memory of parameters and buffers; asked for where an attribute is a tensor."""
        return set(map(_memory, registered(self._module))) - {None}

    def _is_data(self, value: Any, depth: int) -> bool:
        kind = type(value)
        if kind in _PLAIN:
            return True
        if isinstance(value, Tensor):
            return refusal(value) is None and kind is Tensor and _memory(value) not in self._registered
        if kind is np.ndarray or isinstance(value, np.generic):
            return array_as_tensor(np.asarray(value)) is not None
        if depth == _DEPTH:
            return False
        if kind in _MAPPINGS:
            known = kind is not defaultdict or value.default_factory in _FACTORIES
            return known and all(
                _is_key(key) and self._is_data(item, depth + 1) for key, item in value.items()
            )
        if kind in (set, frozenset):
            return all(map(_is_key, value))
        return kind in _SEQUENCES and all(self._is_data(item, depth + 1) for item in value)

    def overlapping(self) -> set[tuple[str, str]]:
        """Attributes whose tensors share memory with another's, read otherwise, that has been written to.

        Tensors that were only made so, as the parts of an LSTM's output are, may be parted.
        """
        readings: dict[object, set[object]] = {}
        holders: dict[object, set[tuple[str, str]]] = {}
        written = set()
        for place, value in self.values.items():
            for tensor in _tensors(value):
                memory = _memory(tensor)
                if memory is not None:
                    readings.setdefault(memory, set()).add(identity(tensor))
                    holders.setdefault(memory, set()).add(place)
                    if not tensor.is_inference() and tensor._version > 0:
                        written.add(memory)
        torn = {memory for memory, seen in readings.items() if len(seen) > 1 and memory in written}
        return set(itertools.chain.from_iterable(holders[memory] for memory in torn))


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that share memory; None for one that has none."""
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    return None if start == 0 else (tensor.device, start)


def _is_key(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_is_key, value)))


def _stands(built: Built | None, path: str, name: str, value: Any) -> bool:
    if built is None or type(value) is not str:
        return False
    return bool(built.scalars.get(path, {}).get(name) == value)


def _home(part: nn.Module, root: nn.Module) -> torch.device:
    """The device that a module computes on."""
    for module in (part, root):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _marks(value: Any, part: nn.Module, root: nn.Module) -> dict[str, list[int]]:
    tensors = list(_tensors(value))
    if not tensors:
        return {}
    home = _home(part, root)
    host = [i for i, t in enumerate(tensors) if t.device.type == "cpu" != home.type]
    grad = [i for i, t in enumerate(tensors) if t.is_leaf and t.requires_grad]
    return {name: found for name, found in (("host", host), ("grad", grad)) if found}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, list | tuple | deque):
        yield from itertools.chain.from_iterable(map(_tensors, value))


def _mapped(value: Any, made: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `value` with another tensor for each of its tensors, in order."""
    if isinstance(value, Tensor):
        return made(value)
    if isinstance(value, dict):
        items = {key: _mapped(item, made) for key, item in value.items()}
        if type(value) is dict:
            return items
        empty = copy.copy(value)  # keeps a defaultdict's factory
        empty.clear()
        empty.update(items)
        return empty
    if isinstance(value, deque):
        return deque((_mapped(item, made) for item in value), value.maxlen)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, made) for item in value)
    return copy.copy(value)


def restore_attributes(module: nn.Module, tree: Mapping[str, Any], built: Built | None = None) -> None:
    """Give `module` and its parts the attributes of `tree`, as `capture_attributes` gave them.

    Tensors are new ones, since a live one may be the data's or another attribute's; one that requires a gradient is
    written in place, because an optimizer may hold it. An attribute that came after `built` is removed.
    """
    parts = unique_submodules(module)
    if built is not None:
        _remove_later(parts, capture_attributes(module), tree, built)
    made: dict[int, Tensor] = {}
    for path, values in tree["values"].items():
        for name, saved in values.items():
            part = parts[path]
            marks = tree["marks"].get(_joined(path, name), {})
            live = list(_tensors(vars(part).get(name)))
            new = _Replicas(made, live, marks, _home(part, module))
            vars(part)[name] = _mapped(saved, new)
    for name, earlier in tree["shared"].items():
        owner, _, key = name.rpartition(".")
        first, _, of = earlier.rpartition(".")
        vars(parts[owner])[key] = vars(parts[first])[of]


class _Replicas:
    """Makes the live tensors of one attribute from the saved ones, in order."""

    def __init__(
        self,
        made: dict[int, Tensor],
        live: list[Tensor],
        marks: Mapping[str, list[int]],
        home: torch.device,
    ) -> None:
        self._made = made
        self._live = live
        self._marks = marks
        self._home = home
        self._index = -1

    def __call__(self, saved: Tensor) -> Tensor:
        self._index += 1
        if id(saved) not in self._made:
            self._made[id(saved)] = self._new(saved)
        return self._made[id(saved)]

    def _new(self, saved: Tensor) -> Tensor:
        wants_grad = self._index in self._marks.get("grad", ())
        if wants_grad and self._index < len(self._live):
            live = self._live[self._index]
            if live.is_leaf and live.requires_grad and overwrite(live, saved):
                return live
        on_host = self._index in self._marks.get("host", ())
        return replica(saved, torch.device("cpu") if on_host else self._home).requires_grad_(wants_grad)


def _remove_later(
    parts: Mapping[str, nn.Module], live: Mapping[str, Any], tree: Mapping[str, Any], built: Built
) -> None:
    names = [(path, name) for path, values in live["values"].items() for name in values]
    names += [(path, name) for path, _, name in (full.rpartition(".") for full in live["shared"])]
    for path, name in names:
        kept = name in tree["values"].get(path, ()) or _joined(path, name) in tree["shared"]
        if not kept and name not in built.names.get(path, ()):
            del vars(parts[path])[name]


def attribute_differences(module: nn.Module, tree: Mapping[str, Any]) -> Iterator[str]:
    """Why the attributes of `tree` cannot be set: the module has other things of these names."""
    parts = unique_submodules(module)
    for path, values in tree["values"].items():
        part = parts.get(path)
        if part is None:
            continue  # told as a difference of modules
        for name in values:
            for kind, there in (
                ("parameter", part._parameters),
                ("buffer", part._buffers),
                ("module", part._modules),
            ):
                if name in there:
                    yield f"attribute {_joined(path, name)!r}: checkpoint has a plain one, the model has a {kind}"


def other_constants(built: Built, saved_built: Scalars, tree: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that the script gives other values than it gave in the checkpoint's training, which kept them."""
    for path, values in saved_built.items():
        here = built.scalars.get(path, {})
        kept = tree["values"].get(path, {})
        for name, value in values.items():
            if type(value) is str or name not in here or name not in kept:
                continue
            if _same(kept[name], value) and not _same(here[name], value):
                yield (
                    f"{name} of {_described(path)}: checkpoint has {value!r}, the model was built with {here[name]!r}"
                )


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)


def _described(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
