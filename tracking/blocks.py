"""Transitions by the thousand: slots of the flight recorder as columns, for the batches that went as most go."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tracking.recorder import Slot

__all__ = ["Block", "blocks"]

_NAMES = (
    "seq",
    "arc",
    "scope",
    "phase",
    "slots",
    "flags",
    "epoch",
    "batch",
    "time_ns",
    "duration_ns",
    "loss",
)
_FORMATS = ("<i8", "<u2", "<u2", "<u2", "u1", "u1", "<i8", "<i8", "<i8", "<i8", "<f8")
_OFFSETS = (0, 8, 10, 12, 14, 15, 16, 24, 32, 40, 48)
_TYPE = np.dtype({"names": _NAMES, "formats": _FORMATS, "offsets": _OFFSETS, "itemsize": 64})


@dataclass(frozen=True)
class Block:
    """Packed rows that share their word, as columns; all lists are of one length.

    Of a row: the first transition's `seq` and `time_ns`, the distances in time of those that follow (`later`),
    how long each took (`durations`), and the loss of the one at `loss_at` (-1: of none).
    """

    arcs: tuple[int, ...]
    phases: tuple[int, ...]
    loss_at: int
    seq: list[int]
    scope: list[int]
    epoch: list[int]
    batch: list[int]
    time_ns: list[int]
    later: list[list[int]]
    durations: list[list[int]]
    loss: list[float]


def blocks(data: bytes, forwards: Collection[int], longest: int) -> tuple[list[Block], list[Slot]]:
    """The rows that whole batches make in `data`, slots without notes; and the slots that are not in them.

    Those are of runs of slots that do not fit a row of `longest`, or carry two losses.
    What may share a row is said in `tracking.packing`.
    """
    slots = np.frombuffer(data, _TYPE)
    if not len(slots):
        return [], []
    arc, loss, seq = slots["arc"], slots["loss"], slots["seq"]
    is_forward = np.zeros(1 << 16, bool)
    is_forward[list(forwards)] = True
    carries = is_forward[arc] | (loss == loss)
    begins = np.ones(len(slots), bool)
    begins[1:] = np.diff(seq) != 1
    for column in ("scope", "epoch", "batch"):
        begins[1:] |= slots[column][1:] != slots[column][:-1]
    first = np.flatnonzero(begins)
    length = np.diff(first, append=len(slots))
    losses = np.add.reduceat(carries, first, dtype=np.int64)
    left = (length <= longest) & (losses <= 1)
    rest = [slot for at in np.flatnonzero(~left) for slot in _slots(slots, first[at], length[at])]

    found = []
    # What a transition says but for its place: rows that are equal in it share a word.
    kind = arc.astype(np.int64) | slots["phase"].astype(np.int64) << 16 | carries.astype(np.int64) << 32
    while left.any():
        one = int(np.argmax(left))
        alike = np.flatnonzero(left & (length == length[one]))
        cells = first[alike][:, None] + np.arange(length[one])
        same = (kind[cells] == kind[first[one] : first[one] + length[one]]).all(axis=1)
        left[alike[same]] = False
        found.append(_block(slots, cells[same], carries))
    return found, rest


def _slots(slots: np.ndarray, first: int, length: int) -> list[Slot]:
    found: list[Slot] = slots[first : first + length].tolist()
    return found


def _block(slots: np.ndarray, cells: np.ndarray, carries: np.ndarray) -> Block:
    heads, pattern = cells[:, 0], cells[0]
    times = slots["time_ns"][cells]
    with_loss = np.flatnonzero(carries[pattern])
    loss_at = int(with_loss[0]) if len(with_loss) else -1
    return Block(
        arcs=tuple(slots["arc"][pattern].tolist()),
        phases=tuple(slots["phase"][pattern].tolist()),
        loss_at=loss_at,
        **{name: slots[name][heads].tolist() for name in ("seq", "scope", "epoch", "batch")},
        time_ns=times[:, 0].tolist(),
        later=(times[:, 1:] - times[:, :1]).T.tolist(),
        durations=slots["duration_ns"][cells].T.tolist(),
        loss=slots["loss"][cells[:, loss_at]].tolist() if loss_at >= 0 else [],
    )
