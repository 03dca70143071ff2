"""The training that scale.py looks at: a real run whose forward, backward and step compute nothing.

All else is what a training does: batches are fetched, values folded into epochs, validation passes made, checkpoints
saved, everything journaled. It prints what it saw of itself as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator import Callback, Trainer

EPOCH, VALIDATION = 10_000, 100
"""Batches of an epoch, and of the validation pass at its end."""

PER_EPOCH = 5 * EPOCH + 2 + 3 * VALIDATION + 3
"""Transitions of an epoch with its validation."""

NAME = "long"


class Watch(Callback):
    """Notes when the first batch began and how much memory the process has; halts with the first batch if asked to."""

    def __init__(self, *, halts: bool) -> None:
        self._halts = halts
        self.first_batch = 0.0
        self.resident: list[int] = []
        """Bytes, at the end of each epoch."""

    def on_batch_begin(self, batch: int) -> None:
        if not self.first_batch:
            self.first_batch = time.perf_counter()
            if self._halts:
                self.trainer.halt("seen")

    def on_epoch_end(self, epoch: int, metrics: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


def without_computing(trainer: Trainer) -> None:
    """Let forward, backward and step only say what they would have computed."""
    work = trainer._training.work

    def forward() -> None:
        work.loss = 1.0 / (1 + work.place.batches)
        work.metrics["loss"] = work.loss

    def backward() -> None:
        """Nothing."""

    def step() -> None:
        work.metrics["grad_norm"] = work.loss
        work.place.updates += 1

    instead = {"forward": forward, "backward": backward, "step": step}
    for name, work_of in instead.items():
        for of_source in trainer._training.loop.machine.events[name].transitions.values():
            for transition in of_source:
                transition.before[-1] = work_of


def train(root: Path, epochs: int, resume: str | None = None) -> dict[str, Any]:
    """Make the run, or go on with it for a batch; what was seen of it."""
    model = nn.Linear(1, 1)
    batch = torch.zeros(1, 1), torch.zeros(1, 1)
    watch = Watch(halts=resume is not None)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), [batch] * EPOCH, [batch] * VALIDATION,
        epochs=epochs, log=None, track=None, callbacks=[watch], name=NAME, root=root,
    )  # fmt: skip
    without_computing(trainer)
    began = time.perf_counter()
    trainer.fit(resume=resume or False)
    ended = time.perf_counter()
    return {
        "run": str(trainer.run.path) if trainer.run else "",
        "seconds": ended - began,
        "first_batch": watch.first_batch - began,
        "resident": watch.resident,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4])))
