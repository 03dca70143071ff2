"""Digests of a captured state: by which a restored one is proved to be the one that was saved."""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from orchestrator.snapshot.chunks import processors
from orchestrator.snapshot.differences import UnsupportedStateError
from orchestrator.snapshot.tensor_entries import storable
from orchestrator.snapshot.tensor_file import memory

__all__ = ["digests", "first_difference"]

_VALUES = "values"


def digests(tree: Mapping[str, Any], *, ignore: Collection[str] = ()) -> dict[str, str]:
    """An XXH3 of 128 bits for each tensor of `tree` by its path (`model/parameters/0.weight`), and some for the rest.

    A tensor's covers dtype, shape, strides and bits: -0.0 is not 0.0, and a NaN has its payload. The rest of
    each top-level entry has one under `ENTRY/values`; types count, the order of a plain dict does not.
    Paths in `ignore`, with all that is below them, are left out. It runs in parallel; tensors on devices are
    copied.

    Raises UnsupportedStateError, naming the path, for what is no part of a training state.
    """
    tensors: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    ignored = frozenset(ignore)
    for key, value in tree.items():
        rest = _canonical(value, str(key), tensors, ignored)
        if rest:
            found[f"{key}/{_VALUES}"] = xxhash.xxh3_128_hexdigest(rest)
    # xxhash releases the interpreter's lock for anything long.
    with ThreadPoolExecutor(max_workers=min(8, processors())) as pool:
        found.update(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    return found


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first path whose digests differ, or that is in one only; None if all agree."""
    for path in (*expected, *(path for path in found if path not in expected)):
        if expected.get(path) != found.get(path):
            return path
    return None


def _digest(tensor: Tensor) -> str:
    stored, entry = storable(tensor)  # in the entry is what of its layout a checkpoint keeps
    header = f"{tensor.dtype} {tuple(tensor.shape)} {sorted(entry.items())}"
    digest = xxhash.xxh3_128(header.encode())
    digest.update(_bits(stored, in_memory_order="stride" in entry))
    return digest.hexdigest()


def _bits(stored: Tensor, *, in_memory_order: bool) -> memoryview:
    host = stored.cpu()
    if in_memory_order and stored.dim() == host.dim():  # most of these need no copy then
        strides = host.stride()
        host = host.permute(sorted(range(host.dim()), key=lambda dim: (-strides[dim], dim)))
    return memory(host.contiguous())


def _canonical(value: Any, path: str, tensors: dict[str, Tensor], ignored: Collection[str]) -> bytes:
    """Bytes that differ wherever two values do; tensors go to `tensors`."""
    if path in ignored:
        return b""
    if isinstance(value, Tensor):
        return _tensor(value, path, tensors)
    kind = type(value).__name__.encode()
    if isinstance(value, Mapping):
        items = [
            _tagged(b"item", [_leaf(key, path), _canonical(item, f"{path}/{key}", tensors, ignored)])
            for key, item in value.items()
            if f"{path}/{key}" not in ignored
        ]
        return _tagged(kind, items if isinstance(value, OrderedDict) else sorted(items))
    if isinstance(value, list | tuple | deque):
        parts = [_canonical(item, f"{path}/{i}", tensors, ignored) for i, item in enumerate(value)]
        return _tagged(kind, parts)
    if isinstance(value, set | frozenset):
        return _tagged(kind, sorted(_canonical(item, path, tensors, ignored) for item in value))
    return _leaf(value, path)


def _tensor(value: Tensor, path: str, tensors: dict[str, Tensor]) -> bytes:
    if value.layout is torch.strided:
        tensors[path] = value
        return b"tensor"
    if value.layout is not torch.sparse_coo:
        raise UnsupportedStateError(
            f"{path} has layout {value.layout}; expected a strided or sparse COO tensor"
        )
    tensors[f"{path}/indices"], tensors[f"{path}/values"] = value._indices(), value._values()
    return b"sparse %d %b" % (value.is_coalesced(), str(tuple(value.shape)).encode())


def _tagged(tag: bytes, parts: list[bytes]) -> bytes:
    return b"".join((tag, b"%d:" % len(parts), *(b"%d:%b" % (len(part), part) for part in parts)))


def _leaf(value: Any, path: str) -> bytes:
    match value:
        case None | bool() | Enum() | torch.dtype() | torch.device():
            return f"{type(value).__name__} {value}".encode()
        case np.ndarray() | np.generic() if value.dtype != object:
            shape = "scalar" if isinstance(value, np.generic) else value.shape
            return f"numpy {value.dtype.str} {shape} ".encode() + np.asarray(value).tobytes()
        case int():
            return b"int %d" % value
        case float():
            return b"float " + struct.pack("<d", value)
        case complex():
            return b"complex " + struct.pack("<dd", value.real, value.imag)
        case str():
            return b"str " + value.encode(errors="surrogatepass")
        case bytes() | bytearray():
            return type(value).__name__.encode() + b" " + value
        case range():
            return repr(value).encode()
        case tuple():  # a key
            return _tagged(b"tuple", [_leaf(item, path) for item in value])
    raise UnsupportedStateError(
        f"{path} is a {type(value).__name__}; expected what a training state consists of: numbers, strings, "
        "tensors, arrays, and dicts, lists, tuples and sets of them"
    )
