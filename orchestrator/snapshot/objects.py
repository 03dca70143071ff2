"""What plain values users' objects hold, kept to be put back: attributes of callbacks, lists that their code fills."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor

from orchestrator.snapshot.tensors import overwrite, replicas

__all__ = ["AttributesKept", "ContainersKept"]

_MOST = 100_000
"""Larger containers are left alone: they are data, or caches."""

_CONTAINERS = (list, dict, set, deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes, Enum)


class AttributesKept:
    """The attributes of an object as they are now, and the content of those that are plain containers and tensors."""

    def __init__(self, item: object) -> None:
        self._item = item
        self._values = dict(vars(item))
        self._inside = ContainersKept(self._values.values(), tensors=True)

    def put_back(self) -> None:
        """Make them what they were; what came since is removed. Objects of other kinds are the same ones again."""
        here = vars(self._item)
        for name in here.keys() - self._values.keys():
            del here[name]
        here.update(self._values)
        self._inside.put_back()


class ContainersKept:
    """Copies of those of `values` that are lists, dicts, sets and deques of plain values; the others are left alone.

    With `tensors`, tensors and arrays are plain values too.
    """

    def __init__(self, values: Iterable[object], *, tensors: bool = False) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}
        wanted = (*_CONTAINERS, Tensor, np.ndarray) if tensors else _CONTAINERS
        for value in values:
            if type(value) in wanted and id(value) not in self._kept and _is_plain(value, tensors):
                self._kept[id(value)] = value, replicas(value)

    def put_back(self) -> None:
        """Give each its content back, in place."""
        for live, kept in self._kept.values():
            if isinstance(live, Tensor):
                overwrite(live, kept)
            elif isinstance(live, np.ndarray):
                live[...] = kept
            else:
                live.clear()
                (live.extend if isinstance(live, list | deque) else live.update)(replicas(kept))


def _is_plain(value: object, tensors: bool) -> bool:
    ahead, left = [value], _MOST
    while ahead:
        left -= 1
        item = ahead.pop()
        if left < 0:
            return False
        if isinstance(item, dict):
            ahead += [*item, *item.values()]
        elif type(item) in (*_CONTAINERS, tuple, frozenset):
            ahead += item  # type: ignore[arg-type]
        elif isinstance(item, Tensor):
            if not tensors or item.requires_grad:
                return False
        elif isinstance(item, np.ndarray):
            if not tensors or item.dtype.hasobject:
                return False
        elif not isinstance(item, (*_SCALARS, np.generic)):
            return False
    return True
