"""A user's training, typed: `make lint` checks it by `mypy --strict`, as users' own checks see interlock's types."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import (
    EMA,
    Callback,
    Checkpointing,
    EarlyStopping,
    Logging,
    LRScheduling,
    MLflow,
    NonFiniteError,
    Phase,
    Result,
    Trainer,
    seed_everything,
)
from states import State, Trigger


class Largest(Callback):
    """The largest loss of each epoch, kept in checkpoints."""

    def __init__(self) -> None:
        self.largest = 0.0

    def on_epoch_begin(self, epoch: int) -> None:
        self.largest = 0.0

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        self.largest = max(self.largest, metrics["loss"])

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.trainer.log("largest", self.largest)

    def state_dict(self) -> dict[str, float]:
        return {"largest": self.largest}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.largest = state["largest"]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = batch
    outputs: Tensor = model(inputs)
    return nn.functional.cross_entropy(outputs, targets), outputs, targets


def train(root: Path) -> Result:
    seed_everything(7)
    model = nn.Sequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(4, (32,))), batch_size=8, shuffle=True)
    trainer = Trainer(
        model,
        [Phase("only", optimizer, forward)],
        None,
        data,
        {"val": data},
        epochs=2,
        metrics={"accuracy": accuracy},
        scheduler=LRScheduling(torch.optim.lr_scheduler.StepLR(optimizer, 1), every="epoch"),
        callbacks=[Largest(), EMA(decay=0.9), EarlyStopping("val/loss", patience=1)],
        checkpoint=Checkpointing(best="val/loss", every_batches=2),
        log=Logging("minimal", to=lambda record: print(record.text)),
        track=MLflow(experiment_name="typed"),
        name="typed",
        root=root,
    )

    @trainer.after(Trigger.BACKWARD)
    def look() -> None:
        print(trainer.state.value, trainer.epoch, trainer.batch)

    with trainer:
        trainer.advance(until=State.BACKWARD)
        save = trainer.save(at=State.BATCH_END)
        try:
            result = trainer.fit()
        except NonFiniteError as error:
            print(error.epoch, error.batch)
            raise
    saved: Path = save.wait(timeout=60)
    print(saved.name)
    losses: list[float] = [epoch["loss"] for epoch in result.history]
    print(result.state, losses, result.best_checkpoint)
    return result
