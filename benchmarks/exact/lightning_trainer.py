"""Lightning: `ModelCheckpoint(every_n_train_steps=...)` and `fit(ckpt_path="last")`, which restores its progress.

With `seed_everything(workers=True)` and `Trainer(deterministic=True)`, as its page on reproducibility asks.
"""

from collections.abc import Sequence
from typing import Any

import lightning
import task
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader


class Classifier(lightning.LightningModule):
    """The network, its loss and its optimization."""

    def __init__(self, record: task.Record) -> None:
        super().__init__()
        self.network = task.network()
        self.record = record

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.network(inputs), targets)
        self.record.loss(self.current_epoch * task.BATCHES + batch_idx, loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = task.optimization(self.network)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(
    kind: type[DataLoader] = DataLoader,
    data: type[task.Samples] = task.Samples,
    callbacks: Sequence[lightning.Callback] = (),
) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    options = task.options()
    record = task.Record(options)
    lightning.seed_everything(task.SEED, workers=True)
    model = Classifier(record)
    saving = ModelCheckpoint(options.folder, every_n_train_steps=task.CHECKPOINT_EVERY, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=task.EPOCHS,
        deterministic=True,
        callbacks=[*callbacks, saving],
        default_root_dir=options.folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # NumPy's and Python's random states, where the contender saves them, need weights_only=False.
    trainer.fit(model, task.loader(options, kind, data), ckpt_path="last", weights_only=False)
    record.weights(model.network)


if __name__ == "__main__":
    main()
