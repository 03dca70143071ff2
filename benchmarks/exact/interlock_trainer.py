"""interlock: `Checkpointing(every_batches=...)`, and the same script again with `fit(resume="auto")`."""

from typing import Any

import task
from torch import nn

from orchestrator import Checkpointing, LRScheduling, Trainer, seed_everything
from states import Trigger


def training(options: task.Options, record: task.Record, **more: Any) -> Trainer:
    seed_everything(task.SEED)
    model = task.network()
    optimizer, scheduler = task.optimization(model)
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        task.loader(options),
        epochs=task.EPOCHS,
        scheduler=LRScheduling(scheduler, every="batch"),
        checkpoint=Checkpointing(every_batches=task.CHECKPOINT_EVERY),
        log=None,
        track=None,
        name="exact",
        root=options.folder,
        deterministic=True,
        **more,
    )
    trainer.after(Trigger.END_BATCH)(lambda: record.loss(trainer.batches - 1, trainer.metrics["loss"]))
    return trainer


if __name__ == "__main__":
    options = task.options()
    record = task.Record(options)
    trainer = training(options, record)
    trainer.fit(resume="auto")
    record.weights(trainer.model)
