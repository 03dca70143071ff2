"""What users' objects hold beside what is captured, kept to be put back: attributes of callbacks, lists, modules."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.snapshot.tensors import is_uninitialized, overwrite, replicas

__all__ = ["AttributesKept", "ContentsKept"]

_MOST, _MOST_ELEMENTS = 100_000, 10**7
"""Larger containers and tensors are left alone: they are data, or caches."""

_HOST = torch.device("cpu")
_CONTAINERS = (list, dict, set, deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes, Enum)


class AttributesKept:
    """The attributes of an object as they are now, and their contents, but for tensors with an id in `captured`."""

    def __init__(self, item: object, captured: Collection[int]) -> None:
        self._item = item
        self._values = dict(vars(item))
        self._contents = ContentsKept(self._values.values(), captured, elements=sys.maxsize)

    def put_back(self) -> None:
        """Make them what they were; what came since is removed. Objects of other kinds are the same ones again."""
        here = vars(self._item)
        for name in here.keys() - self._values.keys():
            del here[name]
        here.update(self._values)
        self._contents.put_back()


class ContentsKept:
    """Copies of those of `values` that are tensors, arrays, modules, or containers of plain values and tensors.

    Others, those of more than `elements` elements of tensors, and tensors among `captured`, are left alone.
    """

    def __init__(
        self, values: Iterable[object], captured: Collection[int], elements: int = _MOST_ELEMENTS
    ) -> None:
        self._captured = captured
        self._kept: dict[int, tuple[Any, Any]] = {}
        for value in values:
            if isinstance(value, nn.Module):
                for tensor in (*value.parameters(), *value.buffers()):
                    self._keep(tensor, elements)
            elif type(value) in (*_CONTAINERS, Tensor, np.ndarray):
                self._keep(value, elements)

    def _keep(self, value: Any, elements: int) -> None:
        if not (id(value) in self._kept or id(value) in self._captured) and _is_plain(value, elements):
            # On the host where there is room; what a container gets back must be where it was.
            self._kept[id(value)] = value, replicas(value, _HOST if isinstance(value, Tensor) else None)

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


def _is_plain(value: object, elements: int) -> bool:
    if isinstance(value, nn.Parameter):
        return not is_uninitialized(value) and value.numel() <= elements
    ahead, left = [value], _MOST
    while ahead and left >= 0 and elements >= 0:
        left -= 1
        item = ahead.pop()
        if isinstance(item, dict):
            ahead += [*item, *item.values()]
        elif type(item) in (*_CONTAINERS, tuple, frozenset):
            ahead += item  # type: ignore[arg-type]
        elif isinstance(item, Tensor) and not item.requires_grad:
            elements -= item.numel()
        elif isinstance(item, np.ndarray) and not item.dtype.hasobject:
            elements -= item.size
        elif not isinstance(item, (*_SCALARS, np.generic)):
            return False
    return left >= 0 and elements >= 0
