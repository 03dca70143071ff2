"""Carrying batches to a device while it computes: on a stream of its own, beside the one that computes."""

import functools
import gc
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from orchestrator.data.batches import leaves, to_device

__all__ = ["Carry", "CudaCarrier", "carrier_to"]

Carry = Callable[[Any], Callable[[], Any]]
"""Begins to move a batch to the device. What it returns gives the batch there, and is called once, when it is used:
what is asked of the device after that call waits for the copy, on the device."""


_LITTLE = 1 << 18  # bytes: copied in less time than another stream is waited for


class CudaCarrier:
    """Copies by a stream of their own, so that they wait for nothing that is being computed.

    Pinned memory (a loader's `pin_memory=True`) is copied while the processor goes on; a little of it by the stream
    that computes. For other memory it waits, for this copy alone. Tensors that are on a device already, and objects
    without tensors, are left to `to_device`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Any) -> Callable[[], Any]:
        """See `Carry`; the batch is as `to_device` gives it."""
        tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
        if not tensors or not all(tensor.is_cpu for tensor in tensors):
            return lambda: to_device(batch, self._device)
        if sum(tensor.nbytes for tensor in tensors) <= _LITTLE and all(map(torch.Tensor.is_pinned, tensors)):
            moved = to_device(batch, self._device)
            return lambda: moved
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            carried = to_device(batch, self._device)
        copied = self._stream.record_event()
        return partial(self._use, carried, copied)

    def _use(self, carried: Any, copied: torch.cuda.Event) -> Any:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for tensor in leaves(carried):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(computing)  # its memory is used by both
        return carried


def carrier_to(device: torch.device) -> Carry | None:
    """What carries batches to `device` while it computes; None where nothing is gained by it."""
    if device.type != "cuda":
        return None
    _let_children_leave_garbage_alone()
    return CudaCarrier(device)


@functools.cache
def _let_children_leave_garbage_alone() -> None:
    """From now on no forked child, as a data worker is, collects what this process has left behind.

    There may be pinned memory in it, which torch tries to give back to the device, and aborts in a process without one.
    """
    os.register_at_fork(after_in_child=gc.freeze)
