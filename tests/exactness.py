"""What two runs of one training must have in common, bit for bit, however often they were interrupted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator import Trainer
from orchestrator.commands.proof import ask, questions
from states import State, Trigger
from states.language import first_illegal_row
from tracking.journal import Journal
from tracking.runs import RunFolder

__all__ = ["Standing", "assert_same", "assert_sound", "ending", "leaves", "recorded", "untimed"]

_TIMES = ("duration", "batch_time")


@dataclass(frozen=True)
class Standing:
    """Where a training stands, and the next attempt has to."""

    state: State
    epoch: int
    batch: int
    batches: int
    updates: int

    @classmethod
    def of(cls, trainer: Trainer) -> Standing:
        return cls(trainer.state, trainer.epoch, trainer.batch, trainer.batches, trainer.updates)


def ending(trainer: Trainer) -> dict[str, Any]:
    """All that a training leaves in memory, by path; durations left out."""
    model = trainer.model
    tree = {
        "model": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "training": {name: module.training for name, module in model.named_modules()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": {name: callback.state_dict() for name, callback in trainer._callbacks.items()},
        "place": Standing.of(trainer),
        "reason": trainer.reason,
        "history": [untimed(values) for values in trainer.history],
        "metrics": untimed(trainer.metrics),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
        "data": trainer._training.snapshots.capture()["data"],
        "validation data": trainer._training.snapshots.capture()["validation_data"],
    }
    return dict(leaves(tree, ""))


def untimed(values: Mapping[str, float]) -> dict[str, float]:
    """The values without those that are durations."""
    return {name: value for name, value in values.items() if name not in _TIMES}


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf by its path, in a form whose equality is that of the bits."""
    if isinstance(tree, Mapping):
        yield path, list(tree)
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        yield path, len(tree)
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}/{number}")
    elif isinstance(tree, torch.Tensor):
        yield (
            path,
            (tree.dtype, tree.shape, tree.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()),
        )
    elif isinstance(tree, np.ndarray):
        yield path, (tree.dtype, tree.shape, tree.tobytes())
    else:
        yield path, float.hex(tree) if isinstance(tree, float) else tree


def recorded(run: RunFolder) -> dict[str, Any]:
    """What the journal says that happened to the training, whoever did it and when: a row for each entry."""
    with Journal.open(run) as journal:
        moves = [
            (r.scope, r.epoch, r.batch, r.phase, r.trigger, r.source, r.dest, _bits(r.loss), r.note)
            for r in journal.transitions()
            if r.trigger not in (Trigger.HALT, Trigger.RESUME)
        ]
        values = [
            (m.scope, m.epoch, m.batch, m.step, m.key, _bits(m.value))
            for m in journal.metrics()
            if m.key not in _TIMES
        ]
    numbered = {f"transition {number}": move for number, move in enumerate(moves)}
    return numbered | {f"metric {number}": value for number, value in enumerate(values)}


def _bits(value: float | None) -> str | None:
    return None if value is None else value.hex()


def assert_sound(run: RunFolder) -> None:
    """The journal over all attempts is one legal word, and nothing that is asked of it finds anything wrong."""
    with Journal.open(run) as journal:
        assert first_illegal_row(journal.transitions()) is None
        asked = questions(journal.attempts())
        findings = ask(asked, journal.packed())
    assert [finding for finding in findings if not finding.good] == []


def assert_same(whole: Mapping[str, Any], broken: Mapping[str, Any]) -> None:
    """Entry by entry; the first that differ are shown."""
    different = [
        f"{path}: {whole.get(path, 'nothing')!s:.300} unbroken, {broken.get(path, 'nothing')!s:.300} interrupted"
        for path in [*whole, *(path for path in broken if path not in whole)]
        if path not in whole or path not in broken or whole[path] != broken[path]
    ]
    assert not different, "\n".join([f"{len(different)} entries differ:", *different[:10]])
