"""Single tensors: referred to in a tree, written back in place, or made anew with the same strides."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.tensor_entries import storable

__all__ = ["copied", "overwrite", "replica", "replicas"]

_MUTABLE = (dict, set, deque, bytearray, np.ndarray)


def overwrite(live: Tensor, saved: Tensor) -> bool:
    """Write `saved` into `live`, in place; False, and nothing done, where that would not be exact.

    It is where shape, dtype and strides agree. Strides count: a kernel, and with it the last bits of a result,
    is chosen by them. (Those that a checkpoint does not keep do not: see `encode`.)
    """
    if is_lazy(live) or live.layout is not torch.strided or saved.layout is not torch.strided:
        return False
    if live.is_inference() or (live.shape, live.dtype) != (saved.shape, saved.dtype):
        return False
    if live.stride() != saved.stride() and storable(live)[1] != storable(saved)[1]:
        return False
    with torch.no_grad():
        _distinct(live).copy_(_distinct(saved))
    return True


def _distinct(tensor: Tensor) -> Tensor:
    """A view of each element once: without the repetitions of an expanded tensor, which are no memory."""
    for dim, (step, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def replica(saved: Tensor, device: torch.device | None = None) -> Tensor:
    """A new tensor with the values, dtype and strides of `saved`, on `device` (default: where it is)."""
    home = saved.device if device is None else device
    with torch.no_grad():
        if saved.layout is torch.sparse_coo:
            return _sparse_replica(saved, home)
        once = _distinct(saved)
        made = torch.empty_strided(once.shape, once.stride(), dtype=saved.dtype, device=home)
        made.copy_(once)
        return made if made.shape == saved.shape else made.expand(saved.shape)


def _sparse_replica(saved: Tensor, device: torch.device) -> Tensor:
    # indices() and values() would refuse what is not coalesced; coalescing would change what is added next.
    indices, values = replica(saved._indices(), device), replica(saved._values(), device)
    return torch.sparse_coo_tensor(
        indices, values, saved.shape, check_invariants=False, is_coalesced=saved.is_coalesced()
    )


def copied(value: Any) -> Any:
    """`value` with copies of its containers; its tensors are detached and not copied."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return copy.copy(value) if isinstance(value, _MUTABLE) else value


def replicas(value: Any, device: torch.device | None = None) -> Any:
    """A deep copy of `value`, with every tensor a replica on `device` (default: where it is)."""
    if isinstance(value, Tensor):
        return replica(value, device)
    if type(value) is dict:
        return {key: replicas(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replicas(item, device) for item in value)
    return copy.deepcopy(value)
