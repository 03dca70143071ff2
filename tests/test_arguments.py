"""Each argument of Trainer makes a difference that can be seen."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainings
from mlflow_server import Database
from orchestrator import Callback, Checkpointing, Logging, MLflow, Trainer
from orchestrator.divergence import DivergenceError
from states import State, Trigger
from tracking.runs import list_runs


def outcome(root: Path, **options: Any) -> dict[str, Any]:
    """What a training leaves that could differ."""
    seen: list[Any] = []
    trainer = trainings.make(root, **options)
    deterministic: list[bool] = []
    trainer.after(Trigger.STEP)(lambda: deterministic.append(torch.are_deterministic_algorithms_enabled()))
    trainings.record_losses(trainer, seen)
    left: Any = None
    try:
        trainer.fit()
    except (SystemExit, Exception) as error:
        left = f"{type(error).__name__} {getattr(error, 'code', '')}"
    (run,) = list_runs(root)
    return {
        "weights": [p.detach().double().sum().item() for p in trainer.model.parameters()],
        "losses": seen,
        "keys": [sorted(epoch) for epoch in trainer.history],
        "learning rates": [epoch.get("lr") for epoch in trainer.history],
        "batches": trainer.batches,
        "updates": trainer.updates,
        "state": trainer.state,
        "left": left,
        "name": run.name,
        "checkpoints": sorted(path.name.split("-")[-1] for path in run.checkpoints.iterdir()),
        "console": run.console_log.exists(),
        "outbox": run.outbox.exists(),
        "deterministic": set(deterministic),
        "validations": len({k for epoch in trainer.history for k in epoch if k.startswith("val/")}),
        "metrics of the last batch": sorted(trainer.metrics),
    }


def ema_like() -> Callback:
    class Scale(Callback):
        def on_epoch_end(self, epoch, metrics) -> None:
            self.trainer.log("seen", epoch)

    return Scale()


def nan_batches():
    batches = list(trainings.loader(shuffle=False))
    batches[2] = (batches[2][0] * float("nan"), batches[2][1])
    return batches


def uneven():
    batches = list(trainings.loader(shuffle=False))
    return [(x[:3], y[:3]) if i % 2 else (x, y) for i, (x, y) in enumerate(batches)]


VAL = {"val_loader": trainings.loader(16)}
MANY = {"epochs": 80}
CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str]] = {
    # argument: (options of both, the argument's other value, what differs)
    "model": ({}, lambda: {"model": trainings.network(dropout=0.0)}, "losses"),
    "optimizer": ({}, lambda: {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}, "losses"),
    "loss_fn": ({}, lambda: {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.2)}, "losses"),
    "train_loader": ({}, lambda: {"train_loader": trainings.loader(12)}, "batches"),
    "val_loader": ({}, lambda: dict(VAL), "validations"),
    "epochs": ({}, lambda: {"epochs": 2}, "batches"),
    "max_batches": ({}, lambda: {"max_batches": 5}, "batches"),
    "max_time": (MANY, lambda: {"max_time": 0.02}, "left"),
    "forward": (
        {},
        lambda: {"forward": lambda model, batch: nn.functional.cross_entropy(model(batch[0] * 2), batch[1])},
        "losses",
    ),
    "metrics": ({}, lambda: {"metrics": {"one": lambda outputs, targets: 1.0}}, "keys"),
    "accumulate": ({}, lambda: {"accumulate": 2}, "updates"),
    "accumulate_weighting": (
        {"accumulate": 2, "train_loader": uneven()},
        lambda: {"accumulate_weighting": "samples"},
        "weights",
    ),
    "clip_grad_norm": ({}, lambda: {"clip_grad_norm": 0.01}, "weights"),
    "precision": ({}, lambda: {"precision": "bf16"}, "losses"),
    "nonfinite": ({"train_loader": nan_batches()}, lambda: {"nonfinite": "skip"}, "state"),
    "validate_every": (dict(VAL), lambda: {"validate_every": 6}, "metrics of the last batch"),
    "callbacks": ({}, lambda: {"callbacks": [ema_like()]}, "keys"),
    "checkpoint": ({}, lambda: {"checkpoint": Checkpointing(every_batches=1, keep_last=5)}, "checkpoints"),
    "log": ({}, lambda: {"log": Logging(to=("file",))}, "console"),
    "name": ({}, lambda: {"name": "another"}, "name"),
    "deterministic": ({}, lambda: {"deterministic": True}, "deterministic"),
}


@pytest.mark.parametrize("argument", CASES)
def test_it_makes_a_difference(argument: str, tmp_path: Path) -> None:
    common, other, what = CASES[argument]
    before = torch.are_deterministic_algorithms_enabled()
    one = outcome(tmp_path / "one", **common)
    two = outcome(tmp_path / "two", **{**common, **other()})
    assert one[what] != two[what]
    assert torch.are_deterministic_algorithms_enabled() is before


def test_scheduler(tmp_path: Path) -> None:
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = outcome(
        tmp_path,
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    assert found["learning rates"] == [1.0, 0.5, 0.25]


def test_track(tmp_path: Path, own_store: Database) -> None:
    """The outbox is there, and a shipper delivers to the store that was named."""
    tracker = MLflow(tracking_uri=own_store.uri, log_model=False)
    found = outcome(tmp_path / "runs", track=tracker, epochs=1)
    assert found["state"] is State.DONE
    (run,) = list_runs(tmp_path / "runs")
    from tracking.shipper import sync

    report = sync(run, timeout=120)
    assert report.complete, report
    assert report.remote_run_id


def test_device(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, device="meta")
    assert {p.device.type for p in trainer.model.parameters()} == {"meta"}
    assert {p.device.type for p in trainings.make(tmp_path).model.parameters()} != {"meta"}


def test_root(tmp_path: Path) -> None:
    trainings.make(tmp_path / "here" / "deep", epochs=1).fit()
    assert len(list_runs(tmp_path / "here" / "deep")) == 1


def test_on_divergence(tmp_path: Path) -> None:
    factor = 1.0

    def forward(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * factor

    trainings.make(tmp_path, forward=forward).fit()
    factor = 1.5
    with pytest.warns(UserWarning, match="done again"):
        trainings.make(tmp_path, forward=forward).replay(0, 0)
    with pytest.raises(DivergenceError):
        trainings.make(tmp_path, forward=forward, on_divergence="halt").replay(0, 0)


def test_init_from(tmp_path: Path) -> None:
    torch.save(trainings.network().state_dict(), tmp_path / "weights.pt")
    one = outcome(tmp_path / "one")
    two = outcome(tmp_path / "two", init_from=tmp_path / "weights.pt")
    assert one["losses"] != two["losses"]


def test_every_argument_has_a_case() -> None:
    arguments = set(inspect.signature(Trainer).parameters)
    assert arguments == {
        *CASES,
        "scheduler",
        "track",
        "root",
        "device",
        "on_divergence",
        "init_from",
        "config",
    }


def test_torchmetrics_objects_and_functions_agree(tmp_path: Path) -> None:
    torchmetrics = importlib.import_module("torchmetrics")

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean()

    metrics = {
        "torchmetrics": torchmetrics.classification.MulticlassAccuracy(3, average="micro"),
        "function": accuracy,
    }
    loader = trainings.loader(9)  # the last batch is short: averages are weighted
    trainer = trainings.make(tmp_path, train_loader=loader, val_loader=loader, metrics=metrics)
    for epoch in trainer.fit().history:
        assert epoch["torchmetrics"] == pytest.approx(epoch["function"])
        assert epoch["val/torchmetrics"] == pytest.approx(epoch["val/function"])


def test_metric_averages_equal_a_direct_computation(tmp_path: Path) -> None:
    seen: list[tuple[float, float, int]] = []
    trainer = trainings.make(tmp_path, train_loader=trainings.loader(9), epochs=1)

    @trainer.after(Trigger.STEP)
    def _note() -> None:
        trainer.log("twice", 2 * trainer.metrics["loss"])
        seen.append((trainer.metrics["loss"], trainer.metrics["grad_norm"], len(trainer.data[1])))

    epoch = trainer.fit().history[0]
    samples = sum(n for *_, n in seen)
    assert samples == 48
    assert epoch["loss"] == pytest.approx(sum(loss * n for loss, _, n in seen) / samples, rel=1e-12)
    assert epoch["twice"] == pytest.approx(2 * epoch["loss"], rel=1e-12)
    assert epoch["grad_norm"] == pytest.approx(sum(g * n for _, g, n in seen) / samples, rel=1e-12)
