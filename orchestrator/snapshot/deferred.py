"""Copies that are made while training goes on, of tensors that it leaves alone until its next update."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.snapshot.from_devices import UnderWay
from orchestrator.snapshot.tensor_file import memory

__all__ = ["Deferred", "Due", "can_wait"]

_LEAST = 1 << 18  # bytes: a smaller one is copied sooner than it is handed to somebody
_PIECE = 1 << 24
_PATIENCE_S = 5.0

_Piece = tuple[Tensor, Tensor]  # to, from


class Due(NamedTuple):
    """A tensor of the state, by its path, and the memory that it is to be copied to, of the same layout."""

    path: str
    place: Tensor
    tensor: Tensor


def can_wait(tensor: Tensor) -> bool:
    """Whether `tensor` can be copied later, and it is worth it, and torch counts what is written to it."""
    if tensor.nbytes < _LEAST or tensor.is_inference():
        return False
    return tensor.is_cuda or (tensor.is_cpu and tensor.is_contiguous())


class Deferred:
    """Copies of some tensors, made by who has time: the thread that will write them, or the loop where it must wait.

    Those from devices are `under_way`: the thread waits for them, the loop lets the devices wait.
    `work_through` is for the thread: it returns when all are complete. `finish` is for the loop, before the tensors
    are written to, and helps. Each of both may be broken off by an exception: what it had begun is done again.

    `changed`: the paths of tensors that were written to in place before their copies were complete, by what torch
    counts (what is written by way of `.data` is not seen). The copies are worth nothing then. With `made`, the copies
    are there already, and `finish` only sees whether that would have happened.
    """

    def __init__(self, due: Sequence[Due], under_way: Sequence[UnderWay] = (), *, made: bool = False) -> None:
        self.made = made
        self._under_way = under_way
        self._versions = [(one.path, one.tensor, one.tensor._version) for one in due]
        self._open = {} if made else dict(enumerate(_pieces(one for one in due if one.tensor.is_cpu)))
        self._left = deque(self._open)
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self.changed: list[str] = []

    def work_through(self) -> None:
        """Copy whatever nobody else does, and wait for the rest."""
        try:
            for copies in self._under_way:
                copies.wait()
            while True:
                while (taken := self._take()) is not None:
                    number, (place, tensor) = taken
                    # Not by torch, which would want several threads for it, beside those of the training.
                    np.copyto(np.asarray(memory(place)), np.asarray(memory(tensor)))
                    self._done(number)
                self._done()
                if self._complete.wait(_PATIENCE_S):
                    return
                # The loop takes long, or was broken off: the same is copied once more. Not the other way round: a copy
                # that this thread is at may last until after the update.
                with self._lock:
                    self._left.extend(self._open)
                self._done()
        except BaseException:
            self._complete.set()  # the loop must not wait for ever
            raise

    def finish(self) -> None:
        """Help with what is left, and wait until all of it is complete; for devices, let them wait."""
        for copies in self._under_way:
            copies.hold_up()
        while (taken := self._take()) is not None:
            number, (place, tensor) = taken
            place.copy_(tensor)
            self._done(number)
        self._done()
        self._complete.wait()

    def _take(self) -> tuple[int, _Piece] | None:
        while self._left:
            try:
                number = self._left.popleft()
            except IndexError:  # the other one was faster
                return None
            if (piece := self._open.get(number)) is not None:
                return number, piece
        return None

    def _done(self, number: int | None = None) -> None:
        """A piece is copied; see whether that was all."""
        with self._lock:
            if number is not None:
                self._open.pop(number, None)
            if not self._open and not self._complete.is_set():
                self.changed = [
                    path for path, tensor, version in self._versions if tensor._version != version
                ]
                self._versions = []
                self._complete.set()


def _pieces(due: Iterable[Due]) -> list[_Piece]:
    return [piece for one in due for piece in zip(_cut(one.place), _cut(one.tensor), strict=True)]


def _cut(tensor: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor in pieces of a bounded size."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return torch.split(flat, max(1, _PIECE // tensor.element_size()))
