"""The task that every contender trains, the same for all: data, network, schedule, and the record of what came out."""

import argparse
import hashlib
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SEED = 7
EPOCHS = 3
BATCHES = 20
BATCH_SIZE = 16
FEATURES = 20
CLASSES = 3
CHECKPOINT_EVERY = 5
TOTAL = EPOCHS * BATCHES

LOSSES = "losses.txt"
WEIGHTS = "weights.sha256"


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Generated samples; with `augment`, noise, scale and sign from the global generators of torch, NumPy, Python."""

    def __init__(self, augment: bool = False, samples: int = BATCHES * BATCH_SIZE) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.inputs = torch.randn(samples, FEATURES, generator=generator)
        self.targets = self.inputs[:, :CLASSES].argmax(1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.inputs[index]
        if self.augment:
            inputs = inputs + 0.1 * torch.randn(FEATURES)
            inputs = inputs * float(np.random.uniform(0.9, 1.1))
            if random.random() < 0.1:
                inputs = -inputs
        return inputs, self.targets[index]


def network() -> nn.Module:
    """A small classifier with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, CLASSES)
    )


def optimization(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and a cosine that is stepped after every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL)


def loader(
    options: "Options", kind: type[DataLoader] = DataLoader, data: type[Samples] = Samples, **more: Any
) -> Any:
    """Shuffled batches, by the DataLoader of torch or by another `kind` of it."""
    samples = data(options.augment)
    return kind(samples, batch_size=BATCH_SIZE, shuffle=True, num_workers=options.workers, **more)


@dataclass(frozen=True)
class Options:
    """What the command line of every contender says."""

    folder: Path
    workers: int
    augment: bool
    kill_at: int | None


def arguments() -> argparse.ArgumentParser:
    """The command line that all contenders have."""
    parser = argparse.ArgumentParser(
        description="Train the task; run again on the same folder, go on with it from its last checkpoint."
    )
    parser.add_argument(
        "folder", type=Path, help="for checkpoints, losses and the digest of the final weights"
    )
    parser.add_argument("--workers", type=int, default=0, help="data workers")
    parser.add_argument("--augment", action="store_true", help="random augmentation in the data set")
    parser.add_argument("--kill-at", type=int, help="SIGKILL this process at this batch, counted from 0")
    return parser


def options(given: argparse.Namespace | None = None) -> Options:
    """What the command line says; sets up torch alike for all."""
    given = given or arguments().parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return Options(given.folder.resolve(), given.workers, given.augment, given.kill_at)


def die() -> None:
    """End this process as a crash does: at once, nothing flushed, nothing closed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Record:
    """What a run leaves to be compared: the loss of every batch in the order of training, and the final weights."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._file = os.open(options.folder / LOSSES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def loss(self, batch: int, value: torch.Tensor | float) -> None:
        """Append the loss of a batch, counted from 0 over all epochs by whoever trains it; die if it is the one."""
        number = value.item() if isinstance(value, torch.Tensor) else value
        os.write(self._file, f"{batch} {number.hex()}\n".encode())
        if batch == self._options.kill_at:
            die()

    def weights(self, model: nn.Module) -> None:
        """Write the SHA-256 of all parameters and buffers."""
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        (self._options.folder / WEIGHTS).write_text(digest.hexdigest())
