"""What tells one data set from another: a fingerprint of plain values, and the differences of two."""

import copy
import functools
import hashlib
import struct
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from orchestrator.data.generators import find_generators, get_state, seed_generator, set_state
from orchestrator.data.loading import BatchMaker, rebuilt
from orchestrator.data.order import Task, index_sampler
from orchestrator.data.randomness import put_globals, seed_globals, take_globals
from orchestrator.warning import warn

__all__ = [
    "compare_fingerprints",
    "fingerprint_iterable",
    "fingerprint_loader",
    "fingerprint_sequence",
    "likely_causes",
]

_UNSTABLE = "unstable"
_COLLATED = "first and last item, collated"
_SPREAD = "items spread over the data set"
_SPREAD_BATCHES = "batches spread over the sequence"
_SPREAD_COUNT = 64
_LARGE = 2**18  # elements: of a larger tensor or array of the spread about so many are looked at
_ENDS = frozenset({"length of the data set", "first item", "last item", "first batch", "last batch"})
_DIGESTS = {
    "first item",
    "last item",
    "first batch",
    "last batch",
    "indices",
    "weights",
    _COLLATED,
    _SPREAD,
    _SPREAD_BATCHES,
}


def compare_fingerprints(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two fingerprints, one readable line each; none means the same data.

    What one of them does not know (None), or was saved before it was taken, is not compared.
    """
    return list(_differing(saved, now).values())


def likely_causes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What usually makes the difference where digests differ, which say nothing themselves; '' where none does."""
    if not any(key.rpartition("/")[2] in _DIGESTS for key in _differing(saved, now)):
        return ""
    return (
        "The data has other contents than it had, which digests tell. The usual reasons: random data, or a random "
        "split, that each process makes anew, without a seed (call seed_everything(7) before it is made, or pass "
        "generator=torch.Generator().manual_seed(7)); a file that was changed since; files or items in another order "
        "(sorted(...) around os.listdir, glob and sets)"
    )


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    differing = {}
    flat_saved, flat_now = _flat(saved), _flat(now)
    for key in [*flat_saved, *(flat_now.keys() - flat_saved.keys())]:
        before, after = flat_saved.get(key), flat_now.get(key)
        if before is not None and after is not None and before != after:
            differing[key] = f"{key}: {before} when saved, {after} now"
    is_sequence = saved.get("kind") == "sequence"
    if any(
        key in _ENDS or key.startswith("data set/") or (is_sequence and key == "number of batches")
        for key in differing
    ):
        for key in (_COLLATED, _SPREAD, _SPREAD_BATCHES):  # they follow from that
            differing.pop(key, None)
    return differing


def fingerprint_sequence(batches: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """The fingerprint of a sequence of batches: its length, and digests of its first and last batch and of 64."""
    ends = (batches[0], batches[-1]) if batches else (None, None)
    return {
        "kind": "sequence",
        "number of batches": len(batches),
        "first batch": _digest_or_none(ends[0]),
        "last batch": _digest_or_none(ends[1]),
        _SPREAD_BATCHES: _spread_digest(batches, len(batches)),
    }


def fingerprint_loader(loader: DataLoader[Any], length: int | None, role: str) -> dict[str, Any]:
    """The fingerprint of a loader; `length` is its number of batches.

    The first and the last item of the data set are read, each twice, from streams of their own, and so are the two
    as the collate function puts them together: in a worker if the loader has workers, since a file that the data
    set opened here would be shared with every worker forked. Of a data set in memory 64 items are looked at.
    """
    dataset: Any = loader.dataset
    size = _size(dataset)
    first, last, collated = _end_digests(loader, size, role)
    return {
        "kind": "map",
        "data set": _describe_dataset(dataset),
        "length of the data set": size,
        "sampler": _describe_sampler(index_sampler(loader)),
        "batch size": loader.batch_size,
        "drop_last": loader.drop_last,
        "number of batches": length,
        "first item": first,
        "last item": last,
        _COLLATED: collated,
        _SPREAD: _spread_digest(dataset, size) if size and _is_in_memory(dataset) else None,
    }


def fingerprint_iterable(loader: DataLoader[Any], role: str, *, read: bool) -> dict[str, Any]:
    """The fingerprint of a loader over an iterable data set; if `read`, with a digest of its first item.

    The item is read twice, each time from an iterator of its own and the same random states: in a worker if the
    loader has workers.
    """
    first = _first_digest(loader) if read else None
    if first == _UNSTABLE:
        _warn_of_unstable(role)
    return {
        "kind": "iterable",
        "data set": _describe_dataset(loader.dataset),
        "batch size": loader.batch_size,
        "drop_last": loader.drop_last,
        "number of workers": loader.num_workers,
        "first item": None if first == _UNSTABLE else first,
    }


def digest(item: Any) -> str:
    """A digest of the content of `item`: tensors, arrays, images, numbers, text, and containers of them.

    Raises TypeError for anything else.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, item)
    return state.hexdigest()


def _feed(state: "hashlib.blake2b", item: Any) -> None:
    if isinstance(item, torch.Tensor):
        plain = item.detach().cpu().contiguous()
        state.update(f"tensor {plain.dtype} {tuple(plain.shape)} ".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(item, np.ndarray | np.generic):
        if item.dtype.hasobject:
            raise TypeError("an array of objects")
        state.update(f"array {item.dtype} {item.shape} ".encode() + item.tobytes())
    elif isinstance(item, float):
        state.update(b"float " + struct.pack("<d", item))
    elif item is None or isinstance(item, bool | int | str | bytes):
        state.update(f"{type(item).__name__} {item!r} ".encode())
    elif isinstance(item, Mapping):
        _feed_all(state, "mapping", [part for pair in item.items() for part in pair])
    elif isinstance(item, list | tuple):
        _feed_all(state, "sequence", item)
    elif hasattr(item, "tobytes") and hasattr(item, "mode") and hasattr(item, "size"):  # an image of Pillow's
        state.update(f"image {item.mode} {item.size} ".encode() + item.tobytes())
    else:
        raise TypeError(f"no digest of a {type(item).__name__}")


def _feed_all(state: "hashlib.blake2b", kind: str, parts: Any) -> None:
    state.update(f"{kind} {len(parts)} ".encode())
    if set(map(type, parts)) == {int}:  # indices, of which there may be millions: the same bytes, but sooner
        state.update(f"int {repr(list(parts))[1:-1].replace(', ', ' int ')} ".encode())
        return
    for part in parts:
        _feed(state, part)


def _digest_or_none(item: Any) -> str | None:
    try:
        return None if item is None else digest(item)
    except Exception:  # a fingerprint that cannot be taken is one that cannot be compared, and no more
        return None


def _spread_digest(items: Any, size: int) -> str | None:
    """A digest of up to 64 items at equal distances, of large tensors among them a part."""
    chosen = sorted({round(index * (size - 1) / (_SPREAD_COUNT - 1)) for index in range(_SPREAD_COUNT)})
    try:
        return digest([_thinned(items[index]) for index in chosen]) if size else None
    except Exception:  # as for an item
        return None


def _thinned(item: Any) -> Any:
    if isinstance(item, torch.Tensor | np.ndarray):
        size = item.numel() if isinstance(item, torch.Tensor) else item.size
        return item.reshape(-1)[:: size // _LARGE] if size > _LARGE else item
    if isinstance(item, Mapping):
        return {key: _thinned(value) for key, value in item.items()}
    return [_thinned(part) for part in item] if isinstance(item, list | tuple) else item


def _is_in_memory(dataset: Any) -> bool:
    """Whether reading an item of `dataset` is known to cost nothing, and to change nothing."""
    if type(dataset) is Subset:
        return _is_in_memory(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_is_in_memory(part) for part in dataset.datasets)
    return type(dataset) in (TensorDataset, list, tuple, torch.Tensor, np.ndarray)


class _Digests(Dataset[Any]):
    """A data set of digests: of another's items by their index, and by -1 of a batch of its first and last.

    Each is made twice from the same stream.
    """

    def __init__(self, loader: DataLoader[Any], role: str, size: int) -> None:
        self.dataset = loader.dataset
        self._loader, self._role = loader, role
        self._ends: Any = [0, size - 1] if loader.batch_sampler is not None else 0
        self._items = BatchMaker(loader, role)
        self._items.collate_fn = digest
        self._items._batched = False

    def __getitem__(self, index: int) -> str | None:
        try:
            if index == -1:
                maker, task = BatchMaker(self._loader, self._role), Task(0, 0, self._ends)
                maker.collate_fn = _DigestOf(_own(self._loader.collate_fn))
            else:
                maker, task = self._items, Task(0, index, index)
            once, again = (maker.make(task) for _ in range(2))
        except Exception:  # any: it is the user's data set, and training it will show
            return None
        return once if once == again else _UNSTABLE


class _DigestOf:
    """A collate function that gives the digest of what another makes."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: Any) -> str:
        return digest(self.collate_fn(items))


def _own(function: Any) -> Any:
    """`function` where what it keeps in its object, if it is one or a method, is apart from the original."""
    if isinstance(function, functools.partial):
        return functools.partial(_own(function.func), *function.args, **function.keywords)
    if isinstance(function, types.MethodType):
        return types.MethodType(function.__func__, _apart(function.__self__))
    return function if isinstance(function, types.FunctionType) else _apart(function)


def _end_digests(
    loader: DataLoader[Any], size: int | None, role: str
) -> tuple[str | None, str | None, str | None]:
    """Those of the first item, the last, and both as one batch."""
    if not size:
        return None, None, None
    digests, keys = _Digests(loader, role, size), [0, size - 1, -1]
    found = _in_worker(loader, digests, keys) if loader.num_workers else [digests[key] for key in keys]
    if _UNSTABLE in found[:2]:
        _warn_of_unstable(role)
    first, last, collated = (None if each == _UNSTABLE else each for each in found)
    return first, last, collated


def _warn_of_unstable(role: str) -> None:
    warn(
        f"{role} data: an item of the data set was not the same when read twice with all known generators seeded "
        "alike, so a resumed run will not be exact; let it draw from torch, random, np.random, or a generator made "
        "in its __init__"
    )


class _FirstItem(IterableDataset[Any]):
    """A data set of one element: the digest of another's first item, read twice from the same streams."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[str | None]:
        try:
            once, again = (self._read() for _ in range(2))
        except Exception:  # any: it is the user's data set, and training it will show
            yield None
        else:
            yield once if once == again else _UNSTABLE

    def _read(self) -> str | None:
        apart, info = _apart(self.dataset), get_worker_info()
        if info is not None:
            object.__setattr__(info, "dataset", apart)
        owned = find_generators({"dataset": apart}).seedable
        main, kept = take_globals(), {path: get_state(generator) for path, generator in owned.items()}
        try:
            seed_globals(0, np.random.MT19937(0))
            for path, generator in owned.items():
                seed_generator(generator, path, 0)
            return next((digest(item) for item in apart), None)
        finally:
            for path, state in kept.items():
                set_state(owned[path], state)
            put_globals(main)


def _apart(dataset: Any) -> Any:
    """A copy of `dataset` to read from: its attributes, and the containers among them, are its own.

    So are those of a data set that it wraps as `dataset`.
    """
    apart = copy.copy(dataset)
    for name, value in list(getattr(apart, "__dict__", {}).items()):
        if name == "dataset":
            vars(apart)[name] = _apart(value)
        elif isinstance(value, list | dict | set):
            vars(apart)[name] = copy.copy(value)
    return apart


def _first_digest(loader: DataLoader[Any]) -> str | None:
    first = _FirstItem(loader.dataset)
    if loader.num_workers == 0:
        return next(iter(first))
    try:
        found: str | None
        (found,) = rebuilt(loader, first, None, generator=torch.Generator(), num_workers=1)
    except Exception:  # as for an item
        return None
    return found


def _in_worker(loader: DataLoader[Any], digests: _Digests, keys: list[int]) -> list[str | None]:
    try:
        found = list(rebuilt(loader, digests, keys, generator=torch.Generator(), num_workers=1))
    except Exception:  # as for an item
        return [None] * len(keys)
    return found


def _describe_dataset(dataset: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"type": _type_name(dataset)}
    if isinstance(dataset, Subset):
        described["indices"] = _digest_or_none(np.asarray(dataset.indices))
        described["of"] = {**_describe_dataset(dataset.dataset), "length": _size(dataset.dataset)}
    return described


def _describe_sampler(sampler: Any) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": _type_name(sampler),
        "length": _size(sampler) if _is_torchs(sampler) else None,
    }
    if isinstance(sampler, RandomSampler | WeightedRandomSampler):
        described["replacement"] = sampler.replacement
        described["num_samples"] = sampler.num_samples
    if isinstance(sampler, WeightedRandomSampler):
        described["weights"] = _digest_or_none(sampler.weights)
    if isinstance(sampler, DistributedSampler):
        described |= {
            name: getattr(sampler, name) for name in ("num_replicas", "shuffle", "seed", "drop_last")
        }
    for name in ("batch_size", "drop_last"):
        value = getattr(sampler, name, None)
        if isinstance(value, int):
            described[name] = value
    if isinstance(sampler, list | tuple):
        described["indices"] = _digest_or_none(sampler)
    if hasattr(sampler, "sampler"):
        described["of"] = _describe_sampler(sampler.sampler)
    return described


def _is_torchs(sampler: Any) -> bool:
    return type(sampler).__module__.startswith("torch.") or isinstance(sampler, list | tuple | range)


def _size(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _type_name(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
