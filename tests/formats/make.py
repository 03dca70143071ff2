"""Makes the stored runs of the present formats: `python tests/formats/make.py`.

Each folder `tests/formats/VERSION/NAME` is a run as it was written when checkpoints had format VERSION: its
journal, and checkpoints of several states, the last of which (DONE) holds the weights that every other one must
lead to. `tests/test_formats.py` restores them all with the code of today. Run this before a version is released;
a folder that was released is never made anew, and the trainings below are never changed: new ones are added.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import EMA, Checkpointing, EarlyStopping, LRScheduling, Phase, Trainer, seed_everything
from orchestrator.snapshot.manifest import FORMAT_VERSION
from states import State
from tracking.journal import Journal
from tracking.runs import RunFolder

HERE = Path(__file__).parent


def _data() -> TensorDataset:
    """Twenty samples made of small integers, so that they are the same bits on every machine."""
    row, column = torch.meshgrid(torch.arange(20), torch.arange(4), indexing="ij")
    inputs = ((row * 7 + column * 13) % 11 - 5) / 4
    return TensorDataset(inputs, inputs[:, :2].argmax(1))


def _loader(*, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(_data(), batch_size=4, shuffle=shuffle)


def _right(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def window(root: Path) -> Trainer:
    """Accumulation, BatchNorm, dropout, AdamW, a schedule by batch, validation, EMA, what is not finite skipped."""
    seed_everything(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.25), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5])),
        _loader(),
        _loader(shuffle=False),
        epochs=2,
        metrics={"right": _right},
        scheduler=LRScheduling(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9), "batch"),
        accumulate=2,
        clip_grad_norm=1.0,
        nonfinite="skip",
        callbacks=[EMA(decay=0.9), EarlyStopping(patience=5)],
        **_common(root),
    )


def phases(root: Path) -> Trainer:
    """Two phases with an optimizer and a schedule each, and a parameter group with settings of its own."""
    seed_everything(2)
    model = nn.ModuleDict({"one": nn.Linear(4, 3), "other": nn.Linear(3, 2)})
    first = torch.optim.SGD(model["one"].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(
        [{"params": [model["other"].weight]}, {"params": [model["other"].bias], "lr": 0.02}], lr=0.01
    )

    def forward(model: nn.Module, batch: Any) -> Any:
        inputs, targets = batch
        outputs = model["other"](model["one"](inputs).tanh())  # type: ignore[index]
        return nn.functional.cross_entropy(outputs, targets), outputs, targets

    return Trainer(
        model,
        [Phase("one", first, forward), Phase("other", second, forward)],
        None,
        _loader(),
        epochs=2,
        callbacks=[
            LRScheduling(torch.optim.lr_scheduler.MultiStepLR(first, [1, 3], gamma=0.5)),
            LRScheduling(torch.optim.lr_scheduler.CosineAnnealingLR(second, T_max=4)),
        ],
        **_common(root),
    )


def _common(root: Path) -> dict[str, Any]:
    return {
        "checkpoint": Checkpointing(keep_last=99),
        "log": None,
        "track": None,
        "name": "stored",
        "root": root,
        "device": "cpu",
    }


STORED: Mapping[str, tuple[Callable[[Path], Trainer], tuple[tuple[int, int, State], ...]]] = {
    "window": (window, ((0, 2, State.BACKWARD), (0, 3, State.BATCH_END), (1, 1, State.BATCH_START))),
    "phases": (phases, ((0, 1, State.STEP), (1, 2, State.BATCH_END))),
}
"""Each run by its name: how its trainer is built, and where (epoch, batch, state) it saves besides epochs' ends.

At the last of these its first attempt halts; a second one goes on from there.
"""


def make(name: str, folder: Path) -> None:
    """Train run `name`, and keep what has a format in `folder`, which must not be there."""
    build, places = STORED[name]
    with tempfile.TemporaryDirectory() as root:
        with build(Path(root)) as trainer:
            for epoch, batch, state in places:
                while (trainer.epoch, trainer.batch, trainer.state) != (epoch, batch, state):
                    trainer.advance()
                trainer.save().wait()
        again = build(Path(root))
        assert again.fit(resume="auto").state is State.DONE
        assert again.run is not None
        _keep(again.run, folder)


def _keep(run: RunFolder, folder: Path) -> None:
    """Copy journal and checkpoints without what tells of the machine that made them."""
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(run.journal)) as connection:
        connection.execute(
            "UPDATE attempts SET host = 'host', pid = 1, process_started = 0, command = 'null'"
        )
        connection.commit()
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
    with Journal.open(run) as journal:
        assert not journal.logs(), "a message may name a path of this machine"
    shutil.copy(run.journal, folder)
    shutil.copytree(run.checkpoints, folder / run.checkpoints.name)


def main() -> None:
    """Make all runs of the present format anew."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    where = HERE / str(FORMAT_VERSION)
    shutil.rmtree(where, ignore_errors=True)
    for name in STORED:
        make(name, where / name)
        sys.stdout.write(f"{where.name}/{name}\n")


if __name__ == "__main__":
    main()
