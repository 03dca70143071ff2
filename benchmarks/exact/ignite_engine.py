"""Ignite: `DeterministicEngine`, whose state has the random states, in a `Checkpoint` with all else; `load_objects`.

As in "Resuming the training" and "Deterministic training" of its documentation: trainer, model, optimizer and
scheduler in one checkpoint, saved by a handler attached after the scheduler's; the seed set before each run.
"""

import task
import torch
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.utils import manual_seed
from torch import nn

options = task.options()
record = task.Record(options)
manual_seed(task.SEED)
model = task.network()
optimizer, scheduler = task.optimization(model)


def update(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    model.train()
    inputs, targets = batch
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    record.loss(engine.state.iteration - 1, loss)
    loss.backward()
    optimizer.step()
    return loss.item()


trainer = DeterministicEngine(update)
trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
to_save = {"trainer": trainer, "model": model, "optimizer": optimizer, "scheduler": scheduler}
checkpoint = Checkpoint(
    to_save,
    DiskSaver(str(options.folder), require_empty=False),
    n_saved=2,
    global_step_transform=lambda engine, _: engine.state.iteration,
)
trainer.add_event_handler(Events.ITERATION_COMPLETED(every=task.CHECKPOINT_EVERY), checkpoint)

saved = sorted(options.folder.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
if saved:
    Checkpoint.load_objects(to_save, torch.load(saved[-1], weights_only=False))
manual_seed(task.SEED)
trainer.run(task.loader(options), max_epochs=task.EPOCHS)
record.weights(model)
