"""How one tensor or array stands in a document: what is stored for it, what else it takes to make it again."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.snapshot.tensor_file import DTYPES

__all__ = ["array_as_tensor", "identity", "rebuilt", "refusal", "storable"]

_PAIRS = {torch.complex128: torch.float64, torch.complex32: torch.float16}
# A tensor that uses little of its memory, such as one column of a table, gets memory of its own when read.
_SPARE = 4


def refusal(tensor: Tensor) -> str | None:
    """Why `tensor`, of any layout, cannot be stored exactly; None if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a tensor of the subclass {type(tensor).__module__}.{type(tensor).__qualname__}"
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    return None


def identity(tensor: Tensor) -> object:
    """Equal for strided tensors that are the same memory read in the same way, as tied weights are."""
    start = tensor.data_ptr()
    if start == 0:  # no elements
        return id(tensor)
    bits = tensor.is_conj(), tensor.is_neg()
    return tensor.device, start, tensor.shape, tensor.stride(), tensor.dtype, bits


def storable(tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A strided `tensor`, or a view of it, of a dtype that a file can hold, detached; and what to add to its entry.

    The entry has `dtype` where the file's differs, `expand` (a shape) where an expanded tensor is stored
    once, and `stride` where the strides are not those of a contiguous tensor. Nothing is copied, save
    where a conjugation or negation is pending.
    """
    # Asking a tensor for anything takes a while, and a state has hundreds.
    stored = tensor.detach() if tensor.requires_grad else tensor
    dtype, shape = stored.dtype, stored.shape
    entry: dict[str, Any] = {}
    if stored.stride() != _contiguous_strides(shape):
        repeated = [dim for dim, size in enumerate(shape) if size > 1 and stored.stride(dim) == 0]
        if repeated and stored.numel():
            entry["expand"] = list(shape)
            for dim in repeated:
                stored = stored.narrow(dim, 0, 1)
        if _worth_keeping(stored):
            entry["stride"] = list(stored.stride())
    if stored.is_neg() or (dtype.is_complex and stored.is_conj()):
        stored = stored.resolve_conj().resolve_neg()
    if dtype not in DTYPES:
        entry["dtype"] = str(dtype).removeprefix("torch.")
        stored = torch.view_as_real(stored) if dtype in _PAIRS else stored.view(torch.uint8)
    return stored, entry


@lru_cache(4096)
def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _worth_keeping(tensor: Tensor) -> bool:
    """Whether no two elements share memory, and the tensor is not a thin slice through much memory."""
    span = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step < span:
                return False
            span += step * (size - 1)
    return span <= _SPARE * max(tensor.numel(), 1024)


def rebuilt(stored: Tensor, entry: dict[str, Any]) -> Tensor:
    """What `storable` was given, made of what was `stored` (contiguous) and of its entry.

    Raises KeyError, TypeError, ValueError or RuntimeError where the two do not go together.
    """
    dtype = _dtype(entry["dtype"]) if "dtype" in entry else stored.dtype
    made = torch.view_as_complex(stored) if dtype in _PAIRS else stored
    if "stride" in entry:
        # Some dtypes cannot be copied, only viewed; hence in this order.
        made = torch.empty_strided(made.shape, entry["stride"], dtype=made.dtype).copy_(made)
    if made.dtype != dtype:
        made = made.view(dtype)
    return made.expand(entry["expand"]) if "expand" in entry else made


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype torch.{name}, which this torch ({torch.__version__}) does not have")
    return found


def array_as_tensor(array: np.ndarray[Any, Any]) -> Tensor | None:
    """A tensor over the memory of `array`, or over a copy where torch cannot read that; None for its other dtypes."""
    if array.dtype.kind not in "biufc" or not array.dtype.isnative or array.dtype.itemsize > 16:
        return None
    whole = all(step >= 0 and step % array.itemsize == 0 for step in array.strides)
    # torch would warn of an array that must not be written to.
    readable = array if whole and array.flags.writeable else array.copy()
    try:
        return torch.from_numpy(readable)
    except TypeError:
        return None
