"""Real training, one thread of the processor: what each batch costs beside a bare loop that reads its loss.

The bare loop and the contenders train the same network on the same batches, which are in memory, in turns (turns.py). A
turn is longer than the quarter of a second after which interlock's journal is written, so none goes without.

interlock keeps its journal and its metrics; "everything on" delivers them to a local MLflow store too, by a process
that stands still when it is not its turn, whose time is among the machine's. What it does more seldom than every other
turn, as sending points, is in no median: delivering.py measures that. The others are at their defaults but for what is
named.

The C library keeps the memory that is freed (but for --trim): by default it gives the gradients' memory back to the
system at each batch or never, as its heap happens to lie, and any contender pays several hundred page faults a batch
or none.

With --device cuda batches come from pinned memory, optimizers are fused unless --foreach, and a turn ends when the
device has done what it was given. With --loader they come from a DataLoader with workers.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import psutil
import torch
from measuring import installed, keep_memory, report
from torch import nn
from torch.utils.data import DataLoader, Dataset
from turns import Contender, Turns, arguments, measured

from orchestrator import MLflow, Trainer, seed_everything

FEATURES = 64
DIFFERENT = 64
"""Batches that are not the same; an epoch has them many times."""


def network(width: int, convolutions: bool, features: int = FEATURES) -> nn.Module:
    """What is trained."""
    seed_everything(1)
    if convolutions:
        return nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * width, 10)),
        )
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 10))


Batches = list[tuple[torch.Tensor, torch.Tensor]] | DataLoader[Any]


class Whole(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches, for a loader that only fetches them."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches[index]
        return inputs.clone(), targets.clone()

    def __len__(self) -> int:
        return len(self.batches)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    fused = True if device_of(model).type == "cuda" and not FOREACH else None
    return torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)


FOREACH = False
"""Whether optimizers on a device are left to their default there."""


class Loader:
    """Batches for Lightning, to which a list is several loaders."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def bare(model: nn.Module, batches: Batches, epochs: int, *, looks: bool = False, reads: bool = True) -> None:
    optimizer, loss_fn = sgd(model), nn.CrossEntropyLoss()
    device = device_of(model)
    moves = device.type != "cpu"
    for inputs, targets in chain.from_iterable(repeat(batches, epochs)):
        if moves:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        if looks:
            nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        optimizer.step()
        if reads:
            loss.item()


def interlock(model: nn.Module, batches: Batches, epochs: int, *, tracked: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        track = MLflow(f"sqlite:///{root}/mlflow.db", patience_s=0.0) if tracked else None
        try:
            Trainer(
                model, sgd(model), nn.CrossEntropyLoss(), batches, epochs=epochs,
                log=None, track=track, checkpoint=None, root=root, device=device_of(model),
            ).fit()  # fmt: skip
        finally:
            while tracked and any(
                root in " ".join(process.info["cmdline"] or [])
                for process in psutil.process_iter(["cmdline"])
            ):
                time.sleep(0.2)  # its shipper


def ignite(model: nn.Module, batches: Batches, epochs: int) -> None:
    from ignite.engine import Engine, Events

    optimizer, loss_fn = sgd(model), nn.CrossEntropyLoss()
    device = device_of(model)
    moves = device.type != "cpu"

    def update(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        inputs, targets = batch
        if moves:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    engine = Engine(update)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: None)
    engine.run(batches, max_epochs=epochs)


def lightning(model: nn.Module, batches: Batches, epochs: int, *, logger: str) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            if logger:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(model)

    with tempfile.TemporaryDirectory() as root:
        chosen: object = False
        if logger == "csv":
            chosen = lightning.pytorch.loggers.CSVLogger(root)
        elif logger == "mlflow":
            chosen = lightning.pytorch.loggers.MLFlowLogger(tracking_uri=f"sqlite:///{root}/mlflow.db")
        data = Loader(batches) if isinstance(batches, list) else batches
        accelerator = "gpu" if device_of(model).type == "cuda" else "cpu"
        lightning.Trainer(
            accelerator=accelerator, devices=1, max_epochs=epochs, logger=chosen, log_every_n_steps=1,
            default_root_dir=root, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ).fit(Module(), data)  # fmt: skip


BARE = "bare loop"
NEVER_READS = "bare loop that reads no loss"
CONTENDERS: dict[str, Callable[[nn.Module, Batches, int], None]] = {
    BARE: bare,
    NEVER_READS: partial(bare, reads=False),
    "bare loop, with torch's norm of the gradients": partial(bare, looks=True),
    "interlock, not tracked": partial(interlock, tracked=False),
    "interlock, everything on": partial(interlock, tracked=True),
    "Ignite, two empty handlers, no logging": ignite,
    "Lightning, no logging": partial(lightning, logger=""),
    "Lightning, logging each step": partial(lightning, logger="csv"),
    "Lightning, MLFlowLogger each step": partial(lightning, logger="mlflow"),
}


def contender(name: str, options: argparse.Namespace) -> Contender:
    """The contender of that name, with a network and batches of its own."""
    layers = Turns(network(options.width, options.convolutions, options.features).to(options.device))
    shape = (options.size, options.features)
    pins = torch.device(options.device).type == "cuda"
    different = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(DIFFERENT)]
    if pins and not options.loader:
        different = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in different]
    batches: Batches = different * (options.epoch // DIFFERENT)
    if options.loader:
        batches = DataLoader(
            Whole(batches),
            batch_size=None,
            num_workers=options.workers,
            pin_memory=pins,
            persistent_workers=True,
        )
    return Contender(name, layers, partial(CONTENDERS[name], layers, batches, 2**20))


if __name__ == "__main__":
    parser = arguments(__doc__, width=32, size=32, epoch=64_000, features=FEATURES, workers=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--foreach", action="store_true", help="no fused optimizers on a device")
    parser.add_argument("--loader", action="store_true", help="batches come from a DataLoader with workers")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), metavar="PART_OF_A_NAME")
    parser.add_argument(
        "--trim", action="store_true", help="let the allocator give memory back to the system"
    )
    parser.add_argument("--convolutions", action="store_true", help="in place of linear layers")
    options = parser.parse_args()
    if not options.trim:
        keep_memory()
    FOREACH = options.foreach
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # Ignite tells of what ends it
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    missing = [peer for peer in ("Ignite", "Lightning") if not installed(peer.lower(), peer)]
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):  # MLflow puts mlruns/ where it is
        names = [
            name
            for name in CONTENDERS
            if (name == BARE or any(part in name for part in options.only))
            and not name.startswith(tuple(missing))
            and (name != NEVER_READS or options.device != "cpu")
        ]
        rows = measured(lambda: [contender(name, options) for name in names], options)
    report(rows, options.json)
