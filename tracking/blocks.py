"""Transitions by the thousand: frames of the flight recorder as columns, for the batches that went as most go."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tracking.frames import LOSS, PRESENT, SIZE, STEPS, STEPS_IN_A_FRAME, TAGS, TIMES, WORDS, Record, decode

__all__ = ["Block", "blocks"]


@dataclass(frozen=True)
class Block:
    """Packed rows that share their word, as columns; all lists are of one length.

    Of a row: the first transition's `seq` and `time_ns`, how long each took (`durations`), and the loss of the one
    at `loss_at` (-1: of none).
    """

    arcs: tuple[int, ...]
    phases: tuple[int, ...]
    scope: int
    loss_at: int
    seq: list[int]
    epoch: list[int]
    batch: list[int]
    time_ns: list[int]
    durations: list[list[int]]
    loss: list[float]
    all_numbers: bool
    """No loss is NaN."""


def blocks(data: bytes, skip: int, forwards: Collection[int]) -> tuple[list[Block], list[Record]]:
    """The rows that the frames in `data` make, and the transitions that are in none of them.

    Those are what follows the first `skip` transitions of the first frame, where that is more than 0, and those with
    notes.
    """
    words = np.frombuffer(data, "<i8").reshape(-1, WORDS)
    losses = np.frombuffer(data, "<f8").reshape(-1, WORDS)[:, LOSS]
    scope, texts = words[:, TAGS] & 0xFFFF, words[:, TAGS] >> 16 & 0xFFFF
    left = (scope != 0xFFFF) & (texts == 0)
    left[0] &= skip == 0
    rest = next(decode(data[:SIZE], forwards))[0][skip:] if skip else []
    for at in np.flatnonzero((scope != 0xFFFF) & (texts > 0)).tolist():
        rest += next(decode(data[at * SIZE : (at + 1 + int(texts[at])) * SIZE], forwards))[0]

    found = []
    steps = words[:, STEPS : STEPS + STEPS_IN_A_FRAME]
    while left.any():
        one = int(np.argmax(left))
        same = left & (scope == scope[one]) & (steps == steps[one]).all(axis=1)
        left &= ~same
        found.append(_block(words[same], losses[same], forwards))
    return found, rest


def _block(words: np.ndarray, losses: np.ndarray, forwards: Collection[int]) -> Block:
    """The block of frames that are alike."""
    steps = [step for step in words[0, STEPS : STEPS + STEPS_IN_A_FRAME].tolist() if step & PRESENT]
    arcs = tuple(step & 0xFFFF for step in steps)
    times = words[:, TIMES : TIMES + len(steps)]
    loss_at = next((at for at, arc in enumerate(arcs) if arc in forwards), -1)
    return Block(
        arcs=arcs,
        phases=tuple(step >> 16 & 0xFFFF for step in steps),
        scope=int(words[0, TAGS] & 0xFFFF),
        loss_at=loss_at,
        seq=words[:, 0].tolist(),
        epoch=words[:, 1].tolist(),
        batch=words[:, 2].tolist(),
        time_ns=times[:, 0].tolist(),
        durations=[words[:, LOSS + 1].tolist(), *np.diff(times, axis=1).T.tolist()],
        loss=losses.tolist() if loss_at >= 0 else [],
        all_numbers=not np.isnan(losses).any(),
    )
