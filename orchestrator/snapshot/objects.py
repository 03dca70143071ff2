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
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.differences import UnsupportedStateError
from orchestrator.snapshot.digests import digests
from orchestrator.snapshot.tensors import overwrite, replicas

__all__ = ["MOST_ELEMENTS", "AttributesKept", "ContentsKept"]

_MOST, MOST_ELEMENTS = 100_000, 10**7
"""Larger containers and tensors are left alone: they are data, or caches."""

_HOST = torch.device("cpu")
_CONTAINERS = (list, dict, set, deque)
_SCALARS = (type(None), bool, int, float, complex, str, bytes, Enum)


class AttributesKept:
    """The attributes of an object as they are now, and their contents, but for tensors with an id in `captured`."""

    def __init__(self, item: object, captured: Collection[int], elements: int = sys.maxsize) -> None:
        self._item = item
        self._values = dict(vars(item))
        self._contents = ContentsKept(self._values.values(), captured, elements)

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
        self, values: Iterable[object], captured: Collection[int], elements: int = MOST_ELEMENTS
    ) -> None:
        self._captured = captured
        self._kept: dict[int, tuple[Any, Any, dict[str, str]]] = {}
        for value in values:
            if isinstance(value, nn.Module):
                for tensor in (*value.parameters(), *value.buffers()):
                    self._keep(tensor, elements)
            elif type(value) in (*_CONTAINERS, Tensor, np.ndarray):
                self._keep(value, elements)

    def _keep(self, value: Any, elements: int) -> None:
        if id(value) in self._kept or id(value) in self._captured or not _is_plain(value, elements):
            return
        if digest := _digest(value):
            # On the host where there is room; what a container gets back must be where it was.
            copy = replicas(value, _HOST if isinstance(value, Tensor) else None)
            self._kept[id(value)] = value, copy, digest

    def put_back(self) -> None:
        """Give each that has changed its content back, in place."""
        for live, kept, digest in self._kept.values():
            if _digest(live) == digest:  # writing the same again would count as a change
                continue
            if isinstance(live, Tensor):
                overwrite(live, kept)
            elif isinstance(live, np.ndarray):
                live[...] = kept
            else:
                live.clear()
                (live.extend if isinstance(live, list | deque) else live.update)(replicas(kept))


def _digest(value: Any) -> dict[str, str]:
    try:
        return digests({"": value.detach() if isinstance(value, Tensor) else value})
    except UnsupportedStateError:
        return {}  # a tensor of another layout, or something else was put into it meanwhile


def _is_plain(value: object, elements: int) -> bool:
    if isinstance(value, nn.Parameter):
        return not is_lazy(value) and value.numel() <= elements
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
        elif isinstance(item, np.ndarray) and not item.dtype.hasobject and item.flags.writeable:
            elements -= item.size
        elif not isinstance(item, (*_SCALARS, np.generic)):
            return False
    return left >= 0 and elements >= 0
