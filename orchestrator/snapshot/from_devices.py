"""Copies of a state's tensors from CUDA devices, which go on while the processor and the device do other things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FromDevices", "UnderWay"]


class UnderWay(NamedTuple):
    """Copies that a device has been asked for."""

    device: torch.device
    done: torch.cuda.Event

    def wait(self) -> None:
        """Wait until they are there."""
        self.done.synchronize()

    def hold_up(self) -> None:
        """Let the device do what it is asked for from now on, by this thread, only once they are there."""
        torch.cuda.current_stream(self.device).wait_event(self.done)


class FromDevices:
    """Copies by a stream of their own on each device, into pinned memory: what is asked of a device later is not
    held up by them, but where `UnderWay.hold_up` says so."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Sequence[UnderWay]:
        """Begin to copy, to the first of each pair what the second, on a CUDA device, is at this point of its work.

        Whoever calls keeps the tensors, and sees to it that nothing is written to them, until the copies are there or
        hold up what writes.
        """
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            by_device.setdefault(pair[1].device, []).append(pair)
        return [self._begin(device, there) for device, there in by_device.items()]

    def _begin(self, device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]) -> UnderWay:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for place, tensor in pairs:
                place.copy_(tensor, non_blocking=True)
        return UnderWay(device, stream.record_event())
