"""A training gives the weights of the loop one would write by hand, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trainings
from orchestrator import LRScheduling, Trainer, seed_everything

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def build(optimizer: str, workers: int, shuffle: bool = True):
    seed_everything(11)
    model = trainings.network()
    return (
        model,
        OPTIMIZERS[optimizer](model),
        DataLoader(trainings.data(), batch_size=8, shuffle=shuffle, num_workers=workers, drop_last=True),
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_weights_and_losses(optimizer: str, workers: int, tmp_path: Path) -> None:
    model, opt, loader = build(optimizer, workers)
    loss_fn, losses = nn.CrossEntropyLoss(), []
    for _ in range(3):
        for inputs, targets in loader:
            opt.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            opt.step()
            losses.append(loss.item())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    after = torch.get_rng_state()

    model, opt, loader = build(optimizer, workers)
    seen: list[float] = []
    trainer = Trainer(model, opt, loss_fn, loader, epochs=3, log=None, track=None, root=tmp_path)
    trainings.record_losses(trainer, seen)
    trainer.fit()
    assert seen == losses
    trainings.assert_equal(trainings.weights(trainer), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_with_clipping_accumulation_scheduler_and_validation(tmp_path: Path) -> None:
    """Validation of a plain loop leaves the global generator alone if its loader has its own (docs/migrating.md)."""
    model, opt, loader = build("adamw", 0)
    val = DataLoader(trainings.data(20, seed=9), batch_size=7, generator=torch.Generator())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    loss_fn, val_losses = nn.CrossEntropyLoss(), []
    for _ in range(3):
        for index, (inputs, targets) in enumerate(loader):
            if index % 2 == 0:
                opt.zero_grad()
            (loss_fn(model(inputs), targets) * 0.5).backward()
            if index % 2 == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                opt.step()
        model.eval()
        with torch.no_grad():
            total = sum(loss_fn(model(x), y).item() * len(y) for x, y in val)
        model.train()
        val_losses.append(total / 20)
        schedule.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    model, opt, loader = build("adamw", 0)
    trainer = Trainer(
        model,
        opt,
        loss_fn,
        loader,
        DataLoader(trainings.data(20, seed=9), batch_size=7),
        epochs=3,
        accumulate=2,
        clip_grad_norm=0.3,
        scheduler=LRScheduling(torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)),
        log=None,
        track=None,
        root=tmp_path,
    )
    result = trainer.fit()
    trainings.assert_equal(trainings.weights(trainer), expected)
    assert [epoch["val/loss"] for epoch in result.history] == pytest.approx(val_losses, rel=1e-12)
    assert [epoch["lr"] for epoch in result.history] == [1e-2, 5e-3, 2.5e-3]


@pytest.mark.parametrize("k", [2, 3, 6])
def test_accumulation_over_k_equal_batches_is_one_batch_k_times_as_large(k: int, tmp_path: Path) -> None:
    """In double precision, with a mean loss and neither BatchNorm nor dropout."""
    found = []
    for accumulate, batch_size in ((k, 4), (1, 4 * k)):
        seed_everything(2)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        samples = trainings.data(48)
        samples.tensors = (samples.tensors[0].double(), samples.tensors[1])
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            nn.CrossEntropyLoss(),
            DataLoader(samples, batch_size=batch_size),
            epochs=2,
            accumulate=accumulate,
            log=None,
            track=None,
            root=tmp_path,
        )
        trainer.fit()
        found.append(trainings.weights(trainer))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=0)
