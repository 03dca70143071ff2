"""Small trainings to test with: a network with BatchNorm and dropout on generated data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Trainer, seed_everything
from states import Trigger


def data(samples: int = 48, seed: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network(dropout: float = 0.5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


class At(nn.Module):
    """Does something else to its input on one batch of the training, as unlucky data would."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], batch: int = 8) -> None:
        super().__init__()
        self.function, self.batch = function, batch
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.function(inputs) if self.seen == self.batch + 1 else inputs


def spoilt(function: Callable[[torch.Tensor], torch.Tensor], batch: int = 8) -> nn.Sequential:
    """A network whose module 2.1 does something else on one batch."""
    middle = nn.Sequential(nn.ReLU(), At(function, batch))
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), middle, nn.Linear(8, 3))


def loader(batch_size: int = 8, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size, shuffle=shuffle, **options)


def make(root: Path, *, seed: int = 1, **options: Any) -> Trainer:
    """A trainer of 3 epochs of 6 batches; silent, untracked, everything else by default.

    `model` is a module, or what makes one after seeding; `optimizer` is one, or what makes one of the model.
    """
    seed_everything(seed)
    model = options.pop("model", network)
    model = model if isinstance(model, nn.Module) else model()
    optimizer = options.pop("optimizer", None)
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    elif callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model)
    given: dict[str, Any] = {"epochs": 3, "log": None, "track": None, "root": root, "name": "test"}
    given["deterministic"] = torch.cuda.is_available()
    if "max_batches" in options:
        given.pop("epochs")
    given.update(options)
    loss_fn = given.pop("loss_fn", None if "forward" in given else nn.CrossEntropyLoss())
    train_loader = given.pop("train_loader", None)
    val_loader = given.pop("val_loader", None)
    return Trainer(
        model, optimizer, loss_fn, loader() if train_loader is None else train_loader, val_loader, **given
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def record_losses(trainer: Trainer, into: list[float]) -> None:
    """Append the loss of every batch to `into`."""
    trainer.after(Trigger.END_BATCH)(lambda: into.append(trainer.metrics["loss"]))
