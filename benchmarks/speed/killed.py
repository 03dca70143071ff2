"""The training that kills.py kills: started again on the same folder, a contender goes on from its last checkpoint.

All train the same network on scikit-learn's digits, on one thread, with dropout and shuffled batches, and imports only
what the contender needs. Loggers, bars and summaries are off. After each batch a line is appended to the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEED = 7
BATCH_SIZE = 64
RECORD = "record.txt"


class Record:
    """Appends batch, loss, and the time of each batch; and the digest of the weights after those that are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._file = os.open(options.folder / RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._digest_at = set(options.digest_at)

    def batch(self, number: int, loss: float, model: nn.Module) -> None:
        """Batch `number`, counted from 1, has been trained, its step included."""
        digest = ""
        if number in self._digest_at:
            found = hashlib.sha256()
            for tensor in model.state_dict().values():
                found.update(tensor.contiguous().numpy().tobytes())
            digest = f" {found.hexdigest()}"
        os.write(self._file, f"{number} {loss.hex()} {time.time()}{digest}\n".encode())


def network() -> nn.Module:
    """A few milliseconds a batch, and 4 MB with its optimizer's state."""
    return nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def samples(options: argparse.Namespace) -> TensorDataset:
    """The digits."""
    data = np.load(options.data)
    return TensorDataset(torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"]))


def loader(options: argparse.Namespace) -> DataLoader[Any]:
    """Shuffled batches."""
    return DataLoader(samples(options), batch_size=BATCH_SIZE, shuffle=True)


def bare(options: argparse.Namespace, record: Record) -> None:
    """A loop that saves nothing: what starting and training cost at least."""
    torch.manual_seed(SEED)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    number = 0
    while True:
        for inputs, targets in loader(options):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            number += 1
            record.batch(number, loss.item(), model)
            if number == options.batches:
                return


def interlock(options: argparse.Namespace, record: Record) -> None:
    """`Checkpointing(overhead=0.03)`, or every so many batches; `fit(resume="auto")`."""
    from orchestrator import Checkpointing, Trainer, seed_everything
    from states import Trigger

    seed_everything(SEED)
    model = network()
    trainer = Trainer(
        model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), loader(options),
        max_batches=options.batches, name="killed", root=options.folder, log=None, track=None,
        checkpoint=Checkpointing(overhead=0.03)
        if not options.every
        else Checkpointing(every_batches=options.every, every_epochs=None),
    )  # fmt: skip
    trainer.after(Trigger.END_BATCH)(lambda: record.batch(trainer.batches, trainer.metrics["loss"], model))
    trainer.fit(resume="auto")


def ignite(options: argparse.Namespace, record: Record) -> None:
    """`Checkpoint` with an atomic `DiskSaver`, and `load_objects`."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.utils import manual_seed

    manual_seed(SEED)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())

    def update(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        model.train()
        inputs, targets = batch
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    def completed(engine: Engine) -> None:
        record.batch(engine.state.iteration, engine.state.output, model)
        if engine.state.iteration >= options.batches:
            engine.terminate()

    trainer = Engine(update)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    saver = DiskSaver(str(options.folder), atomic=True, create_dir=False, require_empty=False)
    saving = Checkpoint(to_save, saver, n_saved=2, global_step_transform=lambda e, _: e.state.iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, completed)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=options.every), saving)
    saved = sorted(options.folder.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    if saved:
        Checkpoint.load_objects(to_save, torch.load(saved[-1], weights_only=False))
    data = loader(options)
    trainer.run(data, max_epochs=-(-options.batches // len(data)))


def lightning(options: argparse.Namespace, record: Record) -> None:
    """`ModelCheckpoint(every_n_train_steps=..., save_last=True)` and `fit(ckpt_path="last")`."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            record.batch(self.global_step, outputs["loss"].item(), self.network)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    lightning.seed_everything(SEED, workers=True, verbose=False)
    saving = ModelCheckpoint(options.folder, every_n_train_steps=options.every, save_last=True)
    lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=options.batches, max_epochs=-1, callbacks=[saving],
        default_root_dir=options.folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), loader(options), ckpt_path="last", weights_only=False)  # fmt: skip


def hf_trainer(options: argparse.Namespace, record: Record) -> None:
    """`save_steps` and `resume_from_checkpoint`, from the newest folder that is whole."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.network(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Recording(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.batch(state.global_step, losses[-1], model.network)

    class Keeping(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses[:] = [loss.item()]
            return loss

    def collate(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*batch, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}

    def whole(folder: Path) -> bool:
        # Written last, and all at once or not at all for a reader that parses it.
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return True

    losses: list[float] = []
    set_seed(SEED)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Keeping(
        model,
        TrainingArguments(
            output_dir=str(options.folder), max_steps=options.batches, per_device_train_batch_size=BATCH_SIZE,
            save_strategy="steps", save_steps=options.every, save_total_limit=2, seed=SEED, data_seed=SEED,
            max_grad_norm=0.0, remove_unused_columns=False, report_to="none", logging_strategy="no",
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=samples(options),
        optimizers=(optimizer, schedule),
        callbacks=[Recording()],
    )  # fmt: skip
    saved = sorted(options.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = [folder for folder in saved if whole(folder)]
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)


CONTENDERS: dict[str, Callable[[argparse.Namespace, Record], None]] = {
    "bare": bare,
    "interlock": interlock,
    "ignite": ignite,
    "hf_trainer": hf_trainer,
    "lightning": lightning,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--every", type=int, help="batches from one checkpoint to the next")
    parser.add_argument("--digest-at", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    CONTENDERS[options.contender](options, Record(options))
