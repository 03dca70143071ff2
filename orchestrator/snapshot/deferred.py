"""Copies that are made while training goes on, of tensors that it leaves alone until its next update."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.snapshot.chunks import DIGESTS, InParallel
from orchestrator.snapshot.from_devices import UnderWay
from orchestrator.snapshot.tensor_file import memory

__all__ = ["Deferred", "Due", "Later", "can_wait"]

_LEAST = 1 << 18  # bytes: a smaller one is copied sooner than it is handed to somebody
_PIECE = 1 << 24
_PATIENCE_S = 5.0


class Later(NamedTuple):
    """How a tensor is to be copied later."""

    compared: bool = False
    """Whether any code may write to it, also where torch does not count it: then what was copied is compared, by a
    digest, with what there was, whatever torch counts. Not for tensors on devices."""
    made: bool = False
    """Whether it is copied at once, and all that is asked is whether it could have been copied later."""


class Due(NamedTuple):
    """A tensor of the state, by its path, and the memory that it is to be copied to, of the same layout.

    `compared`, `made`: see `Later`.
    """

    path: str
    place: Tensor
    tensor: Tensor
    compared: bool = False
    made: bool = False

    def pieces(self) -> list[_Piece]:
        """The two, in pieces of a bounded size."""
        if self.tensor.nbytes <= _PIECE:
            return [_Piece(self.path, self.place, self.tensor)]
        return [_Piece(self.path, *piece) for piece in zip(_cut(self.place), _cut(self.tensor), strict=True)]


class _Piece(NamedTuple):
    path: str
    place: Tensor
    tensor: Tensor
    digest: str | None = None
    """Of what is to be copied, if the copy is to be compared."""

    def arrived(self) -> bool:
        """Whether what lies in its place now is what was to be copied."""
        return self.digest is None or _digest(self.place) == self.digest


def can_wait(tensor: Tensor, *, compared: bool = False) -> bool:
    """Whether `tensor` can be copied later, and it is worth it, and it can be found out what is written to it."""
    if tensor.nbytes < _LEAST or tensor.is_inference():
        return False
    return (tensor.is_cuda and not compared) or (tensor.is_cpu and tensor.is_contiguous())


class Deferred:
    """Copies of some tensors, made by who has time: the thread that will write them, or the loop where it must wait.

    Those from devices are `under_way`: the thread waits for them, the loop lets the devices wait.
    `work_through` is for the thread: it returns when all are complete. `finish` is for the loop, before the tensors
    are written to, and helps. Each of both may be broken off by an exception: what it had begun is done again.

    `changed`: the paths of tensors that were written to before their copies were complete: in place, as torch counts it
    (what is written by way of `.data` is not), or, where they are `compared`, so that another copy came of it. The
    copies are worth nothing then. Of those that are `made`, `finish` finds out whether that would have happened:
    `unsteady`.
    """

    def __init__(self, due: Sequence[Due], under_way: Sequence[UnderWay] = ()) -> None:
        self.paths = [one.path for one in due]
        self._under_way = under_way
        self._made = [(one, one.tensor._version) for one in due if one.made]
        waiting = [one for one in due if not one.made]
        self.waits = bool(waiting)
        """Whether anything is left to be copied."""
        counted = [one for one in waiting if not one.compared]
        self._versions = [(one.path, one.tensor, one.tensor._version) for one in counted]
        pieces = [piece for one in counted if one.tensor.is_cpu for piece in one.pieces()]
        self._open = dict(enumerate([*_digested(waiting), *pieces]))
        self._left = deque(self._open)
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self._spoilt: set[str] = set()
        self.changed: list[str] = []
        self.unsteady: list[str] = []

    def work_through(self) -> None:
        """Copy whatever nobody else does, and wait for the rest."""
        try:
            for copies in self._under_way:
                copies.wait()
            while True:
                while (taken := self._take()) is not None:
                    number, piece = taken
                    # Not by torch, which would want several threads for it, beside those of the training.
                    np.copyto(np.asarray(memory(piece.place)), np.asarray(memory(piece.tensor)))
                    self._done(number, piece)
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
            number, piece = taken
            with torch.no_grad():
                piece.place.copy_(piece.tensor)
            self._done(number, piece)
        self._done()
        self._complete.wait()
        made, self._made = self._made, []
        self.unsteady = [one.path for one, version in made if not _as_it_was(one, version)]

    def _take(self) -> tuple[int, _Piece] | None:
        while self._left:
            try:
                number = self._left.popleft()
            except IndexError:  # the other one was faster
                return None
            if (piece := self._open.get(number)) is not None:
                return number, piece
        return None

    def _done(self, number: int | None = None, piece: _Piece | None = None) -> None:
        """A piece is copied; see whether that was all."""
        spoilt = piece is not None and not piece.arrived()
        with self._lock:
            if piece is not None and spoilt:
                self._spoilt.add(piece.path)
            if number is not None:
                self._open.pop(number, None)
            if not self._open and not self._complete.is_set():
                counted = [path for path, tensor, version in self._versions if tensor._version != version]
                self.changed = counted + sorted(self._spoilt)
                self._versions = []
                self._complete.set()


def _digested(due: Iterable[Due]) -> list[_Piece]:
    """The pieces of those that are to be compared, with digests of what is to be copied."""
    pieces = [piece for one in due if one.compared for piece in one.pieces()]
    with InParallel(lambda piece: piece._replace(digest=_digest(piece.tensor)), pieces) as digesting:
        return digesting.results()


def _digest(tensor: Tensor) -> str:
    return DIGESTS["xxh3_128"]([memory(tensor)])


def _as_it_was(one: Due, version: int) -> bool:
    """Whether a tensor is still what was copied at once."""
    if not one.compared and one.tensor._version != version:
        return False
    # What fused kernels of optimizers write is not counted. It takes a while, once in a training.
    return not one.tensor.is_cpu or _digest(one.place) == _digest(one.tensor)


def _cut(tensor: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor in pieces of a bounded size."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return torch.split(flat, max(1, _PIECE // tensor.element_size()))
