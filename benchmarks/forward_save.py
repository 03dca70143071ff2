"""What it costs to be able to save in FORWARD: nothing, but for a batch that is to be saved there."""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

from orchestrator import Checkpointing, Trainer, seed_everything
from states import State, Trigger


def times(root: str, at: State | None) -> tuple[float, float]:
    """Median µs from fetch to the end of forward: of the batches that are not saved, and of those that are due."""
    seed_everything(1)
    layers: list[nn.Module] = [
        nn.Linear(64, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(256, 10),
    ]
    model = nn.Sequential(*layers)
    batches = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(options.batches)]
    given: dict[str, Any] = {"checkpoint": None}
    if at is not None:
        given["checkpoint"] = Checkpointing(
            every_batches=options.every, every_epochs=None, at=at, keep_last=1
        )
    optimizer = torch.optim.AdamW(model.parameters())
    run = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), batches, epochs=1, log=None, track=None, root=root, **given
    )
    began = 0.0
    found: list[float] = []

    @run.after(Trigger.FETCH)
    def fetched() -> None:
        nonlocal began
        began = time.perf_counter()

    run.after(Trigger.FORWARD)(lambda: found.append((time.perf_counter() - began) * 1e6))
    run.fit()
    due = [spent for batch, spent in enumerate(found) if (batch + 1) % options.every == 0]
    others = [spent for batch, spent in enumerate(found) if (batch + 1) % options.every]
    return statistics.median(others), statistics.median(due)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=900)
    parser.add_argument("--every", type=int, default=100, help="a save in FORWARD every so many batches")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: tuple[State | None, ...] = (None, State.FORWARD)
    found: dict[State | None, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.rounds + 1):
            for way in ways[:: -1 if number % 2 else 1]:  # neither is always the first
                both = times(root, way)
                if number:  # the first round warms up
                    found[way].append(both)
    never = statistics.median(plain for plain, _ in found[None])
    other = statistics.median(others for others, _ in found[State.FORWARD]) / never
    due = statistics.median(due for _, due in found[State.FORWARD]) / never
    print(f"fetch to FORWARD, never saved there   {never:7.1f} µs")
    print(f"the same, of batches that are not due {other:7.2f} times that")
    print(f"and of batches that are saved there   {due:7.2f} times that")
