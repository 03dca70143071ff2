"""Staging memory: where a state waits to be written while training changes the tensors it came from."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Staging"]

_ALIGNMENT = 64


class Staging:
    """One stretch of memory, allocated when first needed and kept; larger states get a larger one.

    What `copy` gave is overwritten by the next `copy`.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._layout: object = None
        self._views: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self._memory.numel()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies of `tensors` in CPU memory, complete when this returns."""
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        layout = bool(devices), tuple((name, t.dtype, t.shape) for name, t in tensors.items())
        if layout != self._layout:
            self._arrange(tensors, pinned=bool(devices))
            self._layout = layout
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._views[name].copy_(tensor, non_blocking=True)
        _wait_for(devices)
        return dict(self._views)

    def release(self) -> None:
        """Give the memory back."""
        self._layout, self._views = None, {}
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _arrange(self, tensors: Mapping[str, Tensor], *, pinned: bool) -> None:
        """Give each tensor its place."""
        places, end = {}, 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            places[name] = end, end + size
            end += size + -size % _ALIGNMENT
        if end > self.size or (pinned and not self._memory.is_pinned()):
            self.release()  # before the larger one is there: never two
            self._memory = _allocate(end, pinned)
        self._views = {
            name: self._memory[begin:stop].view(tensors[name].dtype).view(tensors[name].shape)
            for name, (begin, stop) in places.items()
        }


def _allocate(size: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # Shared with forked data workers rather than copied on write: private memory would have to be copied page
    # by page at the first save after each fork (measured for 200 MB: 250 to 1,000 ms instead of 20).
    memory: Any = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
