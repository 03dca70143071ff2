"""Real training on the processor, one thread: what each batch costs beside a bare loop that reads its loss.

The bare loop and the contenders train the same network on the same batches, which are in memory. A batch is timed
from one forward to another: what comes before the first batch and after the last is
measured elsewhere. interlock keeps its journal and its metrics; "everything on" delivers them to a local
MLflow store too, by a process whose time counts as well. The others are at their defaults but for what is named.

The C library keeps the memory that is freed (but for --trim): by default it gives the gradients' memory back to the
system at each batch or never, as its heap happens to lie, and any contender pays several hundred page faults a batch
or none.
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

import psutil
import torch
from measuring import Cost, alternate, arguments, compared, installed, keep_memory, report
from torch import nn

from orchestrator import MLflow, Trainer, seed_everything


class Stamped(nn.Module):
    """The network; notes the time at a first forward, the `warm`th, and at the last."""

    def __init__(self, width: int, batches: int, warm: int, convolutions: bool) -> None:
        super().__init__()
        seed_everything(1)
        if convolutions:
            self.layers = nn.Sequential(
                *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
                *(nn.Flatten(), nn.Linear(16 * width, 10)),
            )
        else:
            self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.calls, self.batches, self.warm = 0, batches, warm
        self.cost = Cost()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.warm:
            self.began = now()
        elif self.calls == self.batches:
            self.cost = Cost(
                *((b - a) / (self.batches - self.warm) * 1e6 for a, b in zip(self.began, now(), strict=True))
            )
        return self.layers(inputs)


def now() -> tuple[float, float, float]:
    """Seconds: of the clock, of this process's threads, and of all the machine's processors."""
    machine = psutil.cpu_times()
    return time.perf_counter(), time.process_time(), machine.user + machine.nice + machine.system


Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Loader:
    """Batches for Lightning, to which a list is several loaders."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def bare(model: Stamped, batches: Batches, *, looks: bool = False) -> None:
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        if looks:
            nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        optimizer.step()
        loss.item()


def interlock(model: Stamped, batches: Batches, *, tracked: bool) -> None:
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):  # MLflow puts mlruns/ where it is
        track = MLflow(f"sqlite:///{root}/mlflow.db", patience_s=0.0) if tracked else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(
            model, optimizer, nn.CrossEntropyLoss(), batches, epochs=1,
            log=None, track=track, checkpoint=None, root=root,
        ).fit()  # fmt: skip
        while tracked and any(
            root in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
        ):
            time.sleep(0.2)  # its shipper


def ignite(model: Stamped, batches: Batches) -> None:
    from ignite.engine import Engine, Events

    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()

    def update(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    engine = Engine(update)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: None)
    engine.run(batches, max_epochs=1)


def lightning(model: Stamped, batches: Batches, *, logger: str) -> None:
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
            return torch.optim.SGD(model.parameters(), lr=0.1)

    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):  # MLflow puts mlruns/ where it is
        chosen: object = False
        if logger == "csv":
            chosen = lightning.pytorch.loggers.CSVLogger(root)
        elif logger == "mlflow":
            chosen = lightning.pytorch.loggers.MLFlowLogger(tracking_uri=f"sqlite:///{root}/mlflow.db")
        lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=chosen, log_every_n_steps=1, default_root_dir=root,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ).fit(Module(), Loader(batches))  # fmt: skip


BARE = "bare loop"
CONTENDERS: dict[str, Callable[[Stamped, Batches], None]] = {
    BARE: bare,
    "bare loop, with torch's norm of the gradients": partial(bare, looks=True),
    "interlock, not tracked": partial(interlock, tracked=False),
    "interlock, everything on": partial(interlock, tracked=True),
    "Ignite, two empty handlers, no logging": ignite,
    "Lightning, no logging": partial(lightning, logger=""),
    "Lightning, logging each step": partial(lightning, logger="csv"),
    "Lightning, MLFlowLogger each step": partial(lightning, logger="mlflow"),
}


def cost(run: Callable[[Stamped, Batches], None], options: argparse.Namespace) -> Cost:
    """What a batch costs a contender, the first ones left out."""
    model = Stamped(options.width, options.batches, options.warm, options.convolutions)
    shape = (options.size, 64)
    batches = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(options.batches)]
    run(model, batches)
    return model.cost


if __name__ == "__main__":
    parser = arguments(__doc__, batches=2000, rounds=7, width=32, size=32)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), metavar="PART_OF_A_NAME")
    parser.add_argument("--warm", type=int, default=100, help="batches before the first that is measured")
    parser.add_argument(
        "--trim", action="store_true", help="let the allocator give memory back to the system"
    )
    parser.add_argument("--convolutions", action="store_true", help="in place of linear layers")
    options = parser.parse_args()
    if not options.trim:
        keep_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    missing = [peer for peer in ("Ignite", "Lightning") if not installed(peer.lower(), peer)]
    chosen = {
        name: partial(cost, run, options)
        for name, run in CONTENDERS.items()
        if (name == BARE or any(part in name for part in options.only))
        and not name.startswith(tuple(missing))
    }
    report(compared(alternate(chosen, options.rounds), BARE), options.json)
