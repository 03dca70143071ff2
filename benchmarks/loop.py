"""What a batch costs in a Trainer, against a bare loop that reads its loss each batch."""

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

from orchestrator import Trainer, seed_everything


def build() -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]:
    """An MLP 64-32-10 with SGD; batches of 32 that are there already."""
    seed_everything(1)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batches = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(options.batches)]
    return model, torch.optim.SGD(model.parameters(), lr=0.1), batches


def bare() -> float:
    model, optimizer, batches = build()
    loss_fn = nn.CrossEntropyLoss()
    start = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - start) / options.batches * 1e6


def trainer(root: str) -> float:
    model, optimizer, batches = build()
    run = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        batches,
        epochs=1,
        log=None,
        track=None,
        checkpoint=None,
        root=root,
    )
    run.start()
    run.advance()
    start = time.perf_counter()
    run.fit()
    return (time.perf_counter() - start) / options.batches * 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        pairs = [(bare(), trainer(root)) for _ in range(options.rounds + 1)][1:]
    ratios = sorted(ours / plain for plain, ours in pairs)
    print(f"bare loop {statistics.median(p for p, _ in pairs):8.1f} µs a batch")
    print(
        f"Trainer   {statistics.median(o for _, o in pairs):8.1f} µs a batch, journal on, everything written at the end"
    )
    print(f"ratio     {statistics.median(ratios):8.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
