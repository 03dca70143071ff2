"""Staging memory: where a state waits to be written while training changes the tensors it came from."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.snapshot.contents import MODEL, STATE, WEIGHTS, by_path, divided
from orchestrator.snapshot.deferred import Deferred, Due, Later, can_wait
from orchestrator.snapshot.encoding import Encoded
from orchestrator.snapshot.from_devices import FromDevices, UnderWay
from orchestrator.snapshot.tensor_file import Entry, layout, memory

__all__ = ["Staged", "Staging"]


@dataclass(frozen=True)
class Staged:
    """A state as a checkpoint's files will hold it."""

    document: Any
    weights: Sequence[str]
    """See `divided`."""
    files: dict[str, memoryview]
    """The whole content of each file of tensors; each begins at a page of memory, as direct writing wants it."""
    under_way: Sequence[UnderWay] = ()
    """What devices still copy into them."""
    deferred: Deferred | None = None
    """What is to be copied into them later, or was not waited for by what a device does next."""

    def wait(self) -> None:
        """Wait until everything is there that is not deferred."""
        for copies in self.under_way:
            copies.wait()


class Staging:
    """One stretch of memory, allocated when first needed and kept; larger states get a larger one.

    It is arranged as the files are, headers included, so that they are written from where they lie. What `copy` gave is
    overwritten by the next `copy`.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._layout: object = None
        self._places: dict[str, Tensor] = {}
        self._files: dict[str, memoryview] = {}
        self._from_devices = FromDevices()

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self._memory.numel()

    def copy(
        self,
        encoded: Encoded,
        weights: Sequence[str] = WEIGHTS,
        *,
        later: Callable[[str], Later | None] = lambda path: None,
    ) -> Staged:
        """A copy of the tensors in CPU memory, as they are now, whatever is written to them when this has returned.

        What comes from a CUDA device is complete after `Staged.wait`; until then the device does nothing else by this
        thread's stream. Where `later` says so of their paths, and they can be, tensors are copied later (on a device:
        beside what it does next), and complete when `Staged.deferred` is.
        """
        tensors = encoded.tensors
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        arrangement = pinned, weights, [(path, t.dtype, t.shape) for path, t in tensors.items()]
        if arrangement != self._layout:
            self._arrange(tensors, weights, pinned=pinned)
            self._layout = arrangement
        due: list[Due] = []
        on_devices: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for path, tensor in tensors.items():
                place = self._places[path]
                how = later(path)
                if how is not None and can_wait(tensor, compared=how.compared):
                    due.append(Due(path, place, tensor, *how))
                    if not how.made:
                        continue
                if pinned and tensor.is_cuda:
                    on_devices.append((place, tensor))
                else:
                    place.copy_(tensor)
            under_way = self._from_devices.begin(on_devices)
            for copies in under_way:
                copies.hold_up()
            beside = [(one.place, one.tensor) for one in due if one.tensor.is_cuda and not one.made]
            deferred = Deferred(due, self._from_devices.begin(beside)) if due else None
        return Staged(encoded.document, weights, dict(self._files), under_way, deferred)

    def release(self) -> None:
        """Give the memory back."""
        self._layout, self._places, self._files = None, {}, {}
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _arrange(self, tensors: Mapping[str, Tensor], weights: Sequence[str], *, pinned: bool) -> None:
        """Give each file its place, write its header there, and give each tensor its place in it."""
        files = divided(tensors, weights)
        layouts = {name: layout(within) for name, within in files.items()}
        starts, end = {}, 0
        for name, (header, entries) in layouts.items():
            starts[name] = end
            size = len(header) + _end(entries)
            end += size + -size % mmap.PAGESIZE
        if end > self.size or (pinned and not self._memory.is_pinned()):
            self.release()  # before the larger one is there: never two
            self._memory = _allocate(end, pinned)
        whole = memory(self._memory)
        places: dict[str, dict[str, Tensor]] = {}
        self._places, self._files, self._layout = {}, {}, None
        for name, (header, entries) in layouts.items():
            first = starts[name] + len(header)
            whole[starts[name] : first] = header
            self._files[name] = whole[starts[name] : first + _end(entries)]
            places[name] = {
                e.name: self._memory[first + e.begin : first + e.end].view(e.dtype).view(e.shape)
                for e in entries
            }
        self._places = by_path(places[MODEL], places[STATE], weights)


def _end(entries: Sequence[Entry]) -> int:
    return entries[-1].end if entries else 0


def _allocate(size: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # Shared with forked data workers rather than copied on write: private memory would have to be copied page
    # by page at the first save after each fork (measured for 200 MB: 250 to 1,000 ms instead of 20).
    shared: Any = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(shared, dtype=torch.uint8)
