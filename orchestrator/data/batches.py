"""What can be asked of a batch whatever its structure: how many samples, on which device, pinned."""

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from operator import attrgetter, call
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Looks", "described", "first_samples", "leaves", "pinned", "received", "to_device"]


_MOST_PARTS = 8


def count_samples(batch: Any) -> int:
    """How many samples `batch` holds; 0 means that it is empty.

    The size of the first dimension of the first tensor or array found in it, depth first through mappings,
    lists, tuples and dataclasses (a tensor without dimensions is one sample). Where there is none, the length
    of the first list or tuple whose elements are not themselves nested, as `["a", "b"]`; of anything else its
    `len`, and 1 if it has none. None has 0. A PackedSequence has as many samples as sequences.
    """
    if batch is None:
        return 0
    if type(batch) in (list, tuple) and batch and type(batch[0]) is torch.Tensor:
        return int(batch[0].shape[0]) if batch[0].ndim else 1  # nearly every batch there is
    for size in _sizes(batch):
        return size
    for size in _lengths(batch):
        return size
    return 1


def described(batch: Any) -> str:
    """The structure of a batch with dtypes and shapes, as "(float32 [32, 64], int64 [32])"; of many parts the first."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        where = f" on {batch.device}" if isinstance(batch, torch.Tensor) and not batch.is_cpu else ""
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}{where}"
    if isinstance(batch, Mapping):
        items = [f"{key!r}: {described(batch[key])}" for key in itertools.islice(batch, _MOST_PARTS)]
    elif isinstance(batch, list | tuple):
        items = [described(part) for part in batch[:_MOST_PARTS]]
    else:
        return type(batch).__name__
    text = ", ".join([*items, *["..."] * (len(batch) > _MOST_PARTS)])
    return (
        f"{{{text}}}"
        if isinstance(batch, Mapping)
        else f"[{text}]"
        if isinstance(batch, list)
        else f"({text})"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; its structure and types are kept.

    Goes through mappings, lists, tuples, named tuples and dataclasses; an object that has `.to` is asked to
    move itself. Pinned tensors are copied without waiting. What holds nothing to move is returned as it is.
    """
    if device.type == "cpu" and _is_plain(batch) and all(map(_is_on_cpu, batch)):
        return type(batch)(batch)

    def moved(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.to(device, non_blocking=device.type != "cpu" and item.is_pinned())
        return item.to(device)

    return _mapped(batch, moved, "to")


def first_samples(batch: Any, samples: int) -> Any:
    """`batch` with two samples of its `samples` (of one, twice that one): each tensor of as many rows is cut."""

    def cut(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.ndim or item.shape[0] != samples:
            return item
        return torch.cat([item, item]) if samples == 1 else item[:2].clone()

    return _mapped(batch, cut, "to")


def pinned(batch: Any) -> Any:
    """`batch` with every tensor in it in pinned memory, as a loader with `pin_memory=True` gives it."""
    return _mapped(batch, lambda item: item.pin_memory(), "pin_memory")


class Looks:
    """How a batch looked: which tensors were in it, and how often each had been written to in place.

    They are looked for in mappings, lists, tuples, dataclasses, and the attributes of objects that have `.to`. What is
    written past torch is not seen: by way of `.data`, or of a NumPy array.
    """

    def __init__(self, batch: Any, plain: bool | None = None) -> None:
        self._plain = _is_plain(batch) if plain is None else plain
        self._leaves: list[Any]
        """Tensors as weak references."""
        if self._plain:
            self._leaves = list(map(weakref.ref, batch))
            try:
                self._versions = list(map(_counted, batch))
            except RuntimeError:  # an inference tensor, of which torch does not count writes
                self._versions = list(map(_version, batch))
            return
        there = leaves(batch)
        self._leaves = [weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in there]
        self._versions = [_version(leaf) if isinstance(leaf, torch.Tensor) else _NO_TENSOR for leaf in there]

    def changed(self, batch: Any) -> bool:
        """Whether `batch`, which is the same one, does not look so any more."""
        now = leaves(batch)
        return len(now) != len(self._leaves) or not all(map(_looks_so, now, self._leaves, self._versions))

    def written(self) -> list[torch.Tensor]:
        """The tensors that were written to in place since."""
        if self._plain:
            try:
                if list(map(_counted, map(call, self._leaves))) == self._versions:
                    return []
            except (AttributeError, RuntimeError):  # one is gone, or not counted
                pass
        found = []
        for then, version in zip(self._leaves, self._versions, strict=True):
            if version >= 0 and (tensor := then()) is not None and tensor._version != version:
                found.append(tensor)
        return found


def received(batch: Any, device: torch.device) -> tuple[Any, Looks, int]:
    """`batch` on `device`, how it looks there, and how many samples it holds."""
    if not _is_plain(batch):
        moved = to_device(batch, device)
        return moved, Looks(moved), count_samples(batch)
    # As nearly every batch is: what the functions above do, less what they ask of any.
    first = batch[0]
    at_hand = device.type == "cpu" and all(map(_is_on_cpu, batch))
    moved = type(batch)(batch) if at_hand else to_device(batch, device)
    return moved, Looks(moved, plain=True), first.size(0) if first.ndim else 1


_counted = attrgetter("_version")
_is_on_cpu = attrgetter("is_cpu")
_TENSOR = {torch.Tensor}


def _is_plain(batch: Any) -> bool:
    """Whether it is a list or tuple of nothing but tensors, as nearly every batch is."""
    return type(batch) in (list, tuple) and set(map(type, batch)) == _TENSOR


def _looks_so(leaf: Any, then: Any, version: int) -> bool:
    if version == _NO_TENSOR:
        return then is leaf
    return then() is leaf and _version(leaf) == version


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to in place, if torch counts that."""
    return _UNCOUNTED if tensor.is_inference() else tensor._version


_NO_TENSOR, _UNCOUNTED = -1, -2


def leaves(batch: Any) -> list[Any]:
    """The tensors in `batch`, and what else is in its mappings, lists, tuples, dataclasses and objects with `.to`."""
    found: list[Any] = []
    _gather([batch], found)
    return found


def _gather(parts: Collection[Any], found: list[Any]) -> None:
    for part in parts:
        # Plain containers of tensors first: they are nearly all there is.
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif type(part) is dict:
            _gather(part.values(), found)
        elif type(part) in (list, tuple):
            _gather(part, found)
        elif isinstance(part, str | int | float) or not (inner := _parts(part) or _tensors_of(part)):
            found.append(part)
        else:
            _gather(inner, found)


def _tensors_of(item: Any) -> list[torch.Tensor]:
    if not hasattr(item, "to"):
        return []
    return [value for value in getattr(item, "__dict__", {}).values() if isinstance(value, torch.Tensor)]


def _sizes(batch: Any) -> Iterator[int]:
    """The sizes of the first dimension of each tensor or array in `batch`."""
    if isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0]) if len(batch.batch_sizes) else 0
    elif isinstance(batch, torch.Tensor | np.ndarray):
        yield int(batch.shape[0]) if batch.ndim else 1
    else:
        for part in _parts(batch):
            yield from _sizes(part)


def _lengths(batch: Any) -> Iterator[int]:
    """The lengths of each innermost list or tuple in `batch`, or the length of `batch`."""
    parts = _parts(batch)
    nested = [part for part in parts if _parts(part) or isinstance(part, list | tuple)]
    if isinstance(batch, list | tuple) and not nested:
        yield len(batch)
    elif parts:
        for part in parts:
            if not isinstance(part, str | bytes):
                yield from _lengths(part)
    elif hasattr(batch, "__len__") and not isinstance(batch, str | bytes):
        yield len(batch)


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return []


def _mapped(batch: Any, function: Callable[[Any], Any], method: str) -> Any:
    """`batch` with `function` applied to every tensor, and to every object that has `method`."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    # Lists and tuples of tensors first: they are nearly all there is.
    if type(batch) in (list, tuple):
        return type(batch)([_mapped(part, function, method) for part in batch])
    if isinstance(batch, str | bytes | int | float | type(None) | type):
        return batch
    if callable(getattr(batch, method, None)):
        return function(batch)
    if isinstance(batch, Mapping):
        return _mapped_mapping(batch, function, method)
    if isinstance(batch, list | tuple):
        parts = [_mapped(part, function, method) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch):
        return _mapped_dataclass(batch, function, method)
    return batch


def _mapped_mapping(batch: Mapping[Any, Any], function: Callable[[Any], Any], method: str) -> Any:
    mapped = {key: _mapped(value, function, method) for key, value in batch.items()}
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return mapped
    clone = copy.copy(batch)  # keeps an OrderedDict's or a defaultdict's ways
    clone.update(mapped)
    return clone


def _mapped_dataclass(batch: Any, function: Callable[[Any], Any], method: str) -> Any:
    clone = copy.copy(batch)
    for field in dataclasses.fields(batch):
        # Not dataclasses.replace: it refuses fields without init, and runs __post_init__ again.
        object.__setattr__(clone, field.name, _mapped(getattr(batch, field.name), function, method))
    return clone
