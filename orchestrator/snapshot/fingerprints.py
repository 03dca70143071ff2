"""Fingerprints of live values: cheap, taken twice and compared to see whether a value has changed meanwhile."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.snapshot.attributes import attributes
from orchestrator.snapshot.metric_states import capture_states, has_states
from orchestrator.snapshot.names import unique_submodules
from orchestrator.snapshot.tensors import is_uninitialized
from orchestrator.snapshot.users_code import SCALARS, is_users, variables

__all__ = ["NOTHING", "Fingerprints", "memory_of"]

NOTHING: Hashable = None
"""The fingerprint of what has no state that could be seen: functions, modules, objects of libraries."""

_MANY = 256
_DEPTH = 8


class Fingerprints:
    """Takes fingerprints, with nothing for tensors whose memory is among `captured` and objects of `known` ids.

    Without `versions` those of a value and its copy are equal.

    Of a tensor or array up to 1,024 elements are read, with its version, shape and dtype; of a container up to
    256. So a change may go unseen in a large one that was written to by other than torch's means.
    """

    def __init__(
        self, captured: Collection[Hashable], known: Collection[int], *, versions: bool = True
    ) -> None:
        self._versions = versions
        self._captured = captured
        self._known = known
        self._open: set[int] = set()

    def of(self, value: Any, depth: int = 0) -> Hashable:
        """The fingerprint of `value`: equal while it has not changed."""
        if isinstance(value, SCALARS):
            return type(value).__name__, repr(value) if isinstance(value, float | complex) else value
        if id(value) in self._known or id(value) in self._open or depth > _DEPTH:
            return NOTHING
        if isinstance(value, Tensor):
            return NOTHING if memory_of(value) in self._captured else _tensor(value, self._versions)
        if isinstance(value, np.ndarray | np.generic):
            return _array(np.asarray(value))
        self._open.add(id(value))
        try:
            return self._inside(value, depth)
        finally:
            self._open.discard(id(value))

    def _inside(self, value: Any, depth: int) -> Hashable:
        if isinstance(value, set | frozenset):
            return "set", len(value), frozenset(self.of(item, depth + 1) for item in _some(value))
        if isinstance(value, list | tuple | deque):
            return self._all("sequence", len(value), _some(value), depth)
        if isinstance(value, dict):
            keys, values = tuple(map(repr, _some(value))), (value[key] for key in _some(value))
            return self._all("dict", (len(value), keys), values, depth)
        if isinstance(value, nn.Module):
            return self._all("module", None, _inside_module(value), depth)
        if isinstance(value, Optimizer):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
            return self._all("optimizer", None, [groups, list(value.state.values())], depth)
        if isinstance(value, LRScheduler | torch.amp.GradScaler):
            return self._all("object", None, [dict(vars(value))], depth)
        if is_users(type(value)) and not isinstance(value, type):
            return self._all("object", None, [variables(value)], depth)
        return NOTHING

    def _all(self, kind: str, size: Hashable, items: Any, depth: int) -> Hashable:
        parts = tuple(self.of(item, depth + 1) for item in items)
        if parts and all(part is NOTHING for part in parts):
            return NOTHING
        return kind, size, parts


def _some(values: Any) -> list[Any]:
    """All of the values, or the first and last of many."""
    if len(values) <= _MANY:
        return list(values)
    half = _MANY // 2
    last = reversed(values) if hasattr(values, "__reversed__") else ()
    return [*islice(values, half), *islice(last, half)]


def _inside_module(module: nn.Module) -> Iterator[Any]:
    for part in unique_submodules(module).values():
        yield from chain(part._parameters.values(), part._buffers.values())
        yield dict(attributes(part))
        if has_states(part):
            yield capture_states(part)


def memory_of(tensor: Tensor) -> Hashable:
    """Equal for tensors that share memory."""
    if tensor.layout is not torch.strided or is_uninitialized(tensor):
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def _tensor(tensor: Tensor, versions: bool) -> Hashable:
    version = tensor._version if versions and not tensor.is_inference() else None
    return "tensor", str(tensor.dtype), tuple(tensor.shape), version, _sample(tensor)


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta" or is_uninitialized(tensor):
        return b""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return b""
    tensor, size = tensor.detach().resolve_conj().resolve_neg(), tensor.numel()
    if size > 1024:
        chosen = torch.arange(0, size, size // 1024, device=tensor.device)
        tensor = tensor[torch.unravel_index(chosen, tensor.shape)]
    flat = tensor.reshape(-1).cpu().contiguous()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _array(array: np.ndarray[Any, Any]) -> Hashable:
    if array.dtype.hasobject:
        return NOTHING
    chosen = array.flat[:: max(array.size // 1024, 1)] if array.size else array
    return "array", str(array.dtype), array.shape, hashlib.blake2b(chosen.tobytes(), digest_size=16).digest()
