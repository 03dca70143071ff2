"""The built-in callbacks, each in real trainings."""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.early_stopping import EarlyStopping
from orchestrator.callbacks.ema import EMA
from orchestrator.callbacks.gradient_statistics import GradientStatistics, combined, statistics_of
from orchestrator.callbacks.lr_scheduling import LRScheduling
from orchestrator.callbacks.memory_monitor import MemoryMonitor
from orchestrator.callbacks.watched import MissingMetricError, Watched, direction_of
from orchestrator.errors import ConfigurationError
from orchestrator.phase import Phase
from orchestrator.trainer import Trainer
from states.table import State, Trigger

BATCHES = 5


def _loader(poisoned: int | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(BATCHES * 4, 3, generator=generator)
    targets = inputs.sum(1, keepdim=True)
    if poisoned is not None:
        inputs[poisoned * 4] = math.nan
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def _model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


class _Training:
    """A small training: keyword arguments go to Trainer."""

    def __init__(self, root: Path, *, poisoned: int | None = None, **arguments: Any) -> None:
        self.root = root
        self.poisoned = poisoned
        self.arguments = {"epochs": 3, "name": "t", **arguments}

    def trainer(self, *callbacks: Callback, model: nn.Module | None = None, **more: Any) -> Trainer:
        model = _model() if model is None else model
        arguments = {
            "checkpoint": None,
            "log": None,
            "track": None,
            "root": self.root,
            "device": "cpu",
            "optimizer": None,
            **self.arguments,
            **more,
        }
        optimizer = arguments.pop("optimizer") or SGD(model.parameters(), lr=0.05, momentum=0.9)
        loss_fn = nn.MSELoss() if arguments.get("forward") is None else None
        loader = _loader(self.poisoned)
        return Trainer(model, optimizer, loss_fn, loader, callbacks=callbacks, **arguments)


class _Scripted(Callback):
    """Gives each epoch a metric from a list, as a user's callback before the others would."""

    def __init__(self, *values: float, name: str = "val/score") -> None:
        self.values, self.metric = values, name

    def on_epoch_end(self, epoch: int, metrics: Any) -> None:
        self.trainer.history[-1][self.metric] = self.values[epoch]


# -- what a metric is watched for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/loss", "min"), ("loss/generator", "min"), ("val/accuracy", "max"), ("top5_acc", "max")],
)
def test_direction_follows_from_the_name(metric: str, mode: str) -> None:
    assert direction_of(metric, None) == mode
    assert direction_of(metric, "max") == "max"


def test_direction_that_the_name_does_not_say_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match=r"val/score.*pass mode="):
        direction_of("val/score", None)
    with pytest.raises(ConfigurationError, match="'smallest'"):
        direction_of("loss", "smallest")  # type: ignore[arg-type]


def test_nan_never_improves() -> None:
    for mode in ("min", "max"):
        watched = Watched("m", mode)  # type: ignore[arg-type]
        assert not watched.improved(math.nan, watched.worst)
        assert watched.improved(0.0, watched.worst)
        assert not watched.improved(0.0, math.nan)


# -- EarlyStopping ------------------------------------------------------------------------------------


def _epochs_until_stop(root: Path, values: list[float], **arguments: Any) -> tuple[int, str]:
    training = _Training(root, epochs=len(values))
    stopping = EarlyStopping("val/score", **{"mode": "min", **arguments})
    result = training.trainer(_Scripted(*values), stopping).fit()
    assert result.state is State.DONE
    return len(result.history), result.reason


def test_stops_after_patience_epochs_without_improvement(tmp_path: Path) -> None:
    epochs, reason = _epochs_until_stop(tmp_path, [3.0, 2.0, 2.0, 2.5, 2.0, 1.0], patience=3)
    assert epochs == 5
    assert reason == "val/score has not improved on 2 in the last 3 epochs"


def test_an_improvement_starts_the_count_anew(tmp_path: Path) -> None:
    epochs, _ = _epochs_until_stop(tmp_path, [3.0, 3.0, 2.0, 2.0, 1.0, 1.0], patience=2)
    assert epochs == 6


def test_max_mode(tmp_path: Path) -> None:
    epochs, reason = _epochs_until_stop(tmp_path, [0.1, 0.2, 0.15, 0.3], patience=1, mode="max")
    assert epochs == 3
    assert "0.2" in reason
    assert "in the last epoch" in reason


def test_min_delta_is_what_an_improvement_takes(tmp_path: Path) -> None:
    assert _epochs_until_stop(tmp_path, [1.0, 0.95, 0.9, 0.85], patience=2, min_delta=0.2)[0] == 3
    assert _epochs_until_stop(tmp_path, [1.0, 0.95, 0.9, 0.85], patience=2, min_delta=0.01)[0] == 4


def test_nan_counts_as_no_improvement(tmp_path: Path) -> None:
    epochs, reason = _epochs_until_stop(tmp_path, [math.nan] * 4, patience=2)
    assert epochs == 2
    assert "never finite" in reason


def test_missing_metric_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(MissingMetricError, match=r"EarlyStopping watches 'my/loss'.*duration, .*loss"):
        _Training(tmp_path).trainer(EarlyStopping("my/loss")).fit()


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"min_delta": -1.0}, {"monitor": "score"}])
def test_early_stopping_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        EarlyStopping(**arguments)


# -- LRScheduling -------------------------------------------------------------------------------------


def _rates(trainer: Trainer) -> list[float]:
    """The learning rate of each batch, seen while it is applied."""
    rates: list[float] = []

    @trainer.before(Trigger.STEP)
    def look() -> None:
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer.fit()
    return rates


def test_by_epoch_as_in_a_hand_written_loop(tmp_path: Path) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=1e-3)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    trainer = _Training(tmp_path, epochs=4).trainer(LRScheduling(scheduler), model=model, optimizer=optimizer)
    assert _rates(trainer) == pytest.approx([1e-3] * 2 * BATCHES + [1e-4] * 2 * BATCHES)
    assert [epoch["lr"] for epoch in trainer.history] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_by_batch_counts_windows_not_micro_batches(tmp_path: Path) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 10.0**-step)
    training = _Training(tmp_path, epochs=1, accumulate=2)
    trainer = training.trainer(LRScheduling(scheduler, every="batch"), model=model, optimizer=optimizer)
    assert _rates(trainer) == pytest.approx([1.0, 0.1, 0.01])  # five batches make three windows
    assert scheduler.last_epoch == 3


def test_by_batch_does_not_step_after_a_skipped_update(tmp_path: Path) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    training = _Training(tmp_path, epochs=1, poisoned=2, nonfinite="skip")
    trainer = training.trainer(LRScheduling(scheduler, every="batch"), model=model, optimizer=optimizer)
    trainer.fit()
    assert scheduler.last_epoch == BATCHES - 1


@pytest.mark.parametrize(
    ("every", "length", "total", "needed"),
    [
        ("batch", {"epochs": 3}, 14, 15),
        ("batch", {"epochs": 3}, 15, None),
        ("batch", {"epochs": 3, "accumulate": 2}, 8, 9),  # three windows an epoch
        ("batch", {"epochs": 3, "accumulate": 2}, 9, None),
        ("batch", {"epochs": None, "max_batches": 12}, 11, 12),
        ("batch", {"epochs": None, "max_batches": 12}, 12, None),
        ("epoch", {"epochs": 3}, 2, 3),
        ("epoch", {"epochs": 3}, 3, None),
        ("epoch", {"epochs": 3, "max_batches": 10}, 2, None),  # two epochs of five
    ],
)
def test_a_schedule_that_is_over_too_early_is_told_before(
    every: Literal["epoch", "batch"], length: dict[str, Any], total: int, needed: int | None, tmp_path: Path
) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total)
    trainer = _Training(tmp_path, **length).trainer(
        LRScheduling(scheduler, every=every), model=model, optimizer=optimizer
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.advance(until=State.BATCH_START)
    said = [str(warning.message) for warning in found if "total_steps" in str(warning.message)]
    if needed is None:
        assert said == []
        trainer.fit()
        assert trainer.state is State.DONE
        return
    (text,) = said
    assert f"OneCycleLR has {total} steps, 0 of them done, and the training comes to {needed}" in text
    assert f"total_steps={needed};" in text
    with pytest.raises(ValueError, match=f"Tried to step {total + 1} times"):
        trainer.fit()


def test_with_phases_it_follows_the_phase_of_its_optimizer(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    phases = [
        Phase(
            name, SGD(model[name].parameters(), lr=0.1), lambda m, batch, name=name: m[name](batch[0]).mean()
        )
        for name in ("a", "b")
    ]
    scheduler = lr_scheduler.ExponentialLR(phases[1].optimizer, 0.5)
    trainer = _Training(tmp_path, epochs=1, forward=None).trainer(
        LRScheduling(scheduler, every="batch"), model=model, optimizer=phases
    )
    trainer.fit()
    assert scheduler.last_epoch == BATCHES
    assert phases[0].optimizer.param_groups[0]["lr"] == 0.1


def test_on_a_metric(tmp_path: Path) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    trainer = _Training(tmp_path, epochs=4).trainer(
        _Scripted(1.0, 1.0, 0.5, 0.6),
        LRScheduling(scheduler, monitor="val/score"),
        model=model,
        optimizer=optimizer,
    )
    trainer.fit()
    assert [epoch["lr"] for epoch in trainer.history] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_metric_that_is_missing(tmp_path: Path) -> None:
    model = _model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduling = LRScheduling(lr_scheduler.ReduceLROnPlateau(optimizer), monitor="my/loss")
    trainer = _Training(tmp_path).trainer(scheduling, model=model, optimizer=optimizer)
    with pytest.raises(MissingMetricError, match="LRScheduling/ReduceLROnPlateau watches 'my/loss'"):
        trainer.fit()


def test_scheduling_refuses(tmp_path: Path) -> None:
    optimizer = SGD(_model().parameters(), lr=0.1)
    step = lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ConfigurationError, match="name it"):
        LRScheduling(lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigurationError, match="takes no metric"):
        LRScheduling(step, monitor="loss")
    with pytest.raises(ConfigurationError, match="'step'"):
        LRScheduling(step, every="step")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="given an SGD"):
        LRScheduling(optimizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="does not have"):
        _Training(tmp_path).trainer(LRScheduling(step))


# -- EMA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [True, False])
def test_average_equals_torchs_own(tmp_path: Path, use_buffers: bool) -> None:
    model = _model()
    ema = EMA(decay=0.9, use_buffers=use_buffers)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)  # type: ignore[no-untyped-call]
    trainer = _Training(tmp_path).trainer(ema, model=model)
    trainer.after(Trigger.STEP)(lambda: expected.update_parameters(model))
    trainer.fit()
    assert ema.n_averaged == expected.n_averaged == 3 * BATCHES
    ours, theirs = ema.model.state_dict(), expected.module.state_dict()
    for name in ours:
        if name.endswith("num_batches_tracked"):  # torch averages it, and truncates
            assert ours[name] == 3 * BATCHES
        else:
            assert torch.equal(ours[name], theirs[name]), name
    assert not torch.equal(ema.model[0].weight, model[0].weight)  # type: ignore[index, union-attr]


def test_skipped_updates_do_not_count(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    _Training(tmp_path, epochs=1, poisoned=1, nonfinite="skip").trainer(ema).fit()
    assert ema.n_averaged == BATCHES - 1
    assert all(torch.isfinite(parameter).all() for parameter in ema.model.parameters())


def test_start_and_every(tmp_path: Path) -> None:
    ema = EMA(decay=0.5, start=3, every_updates=4)
    trainer = _Training(tmp_path, epochs=2).trainer(ema)
    averaged_at = []
    trainer.after(Trigger.STEP)(lambda: averaged_at.append(ema.n_averaged))
    trainer.fit()
    assert averaged_at == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_validation_evaluates_the_average_once_there_is_one(tmp_path: Path) -> None:
    model = _model()
    ema = EMA(decay=0.8, start=BATCHES, validate=True)
    trainer = _Training(tmp_path, epochs=2, val_loader=_loader()).trainer(ema, model=model)
    evaluated = []
    trainer.before(Trigger.END_EPOCH)(lambda: evaluated.append(trainer.validation_model))
    trainer.fit()
    assert evaluated == [model, ema.model]
    assert trainer.evaluate(_loader())["loss"] == pytest.approx(trainer.history[-1]["val/loss"], rel=1e-12)
    plain = _Training(tmp_path, epochs=2, val_loader=_loader()).trainer()
    plain.fit()
    assert plain.history[0] | {"duration": 0} == trainer.history[0] | {"duration": 0}
    assert plain.history[1]["loss"] == trainer.history[1]["loss"]
    assert plain.history[1]["val/loss"] != trainer.history[1]["val/loss"]


def test_with_phases_it_averages_once_a_batch(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    phases = [
        Phase(
            name, SGD(model[name].parameters(), lr=0.1), lambda m, batch, name=name: m[name](batch[0]).mean()
        )
        for name in ("a", "b")
    ]
    last, first = EMA(decay=0.5), EMA(decay=0.5, phase="a")
    _Training(tmp_path, epochs=1).trainer(last, first, model=model, optimizer=phases, forward=None).fit()
    assert last.n_averaged == first.n_averaged == BATCHES
    assert torch.equal(last.model["a"].weight, first.model["a"].weight)  # type: ignore[index, union-attr]
    assert not torch.equal(last.model["b"].weight, first.model["b"].weight)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("arguments", [{"decay": 1.5}, {"decay": -0.1}, {"every_updates": 0}, {"start": -1}])
def test_ema_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        EMA(**arguments)


def test_ema_refuses_what_only_the_trainer_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'generator'"):
        _Training(tmp_path).trainer(EMA(phase="generator"))
    one = EMA(validate=True)
    one.start = 0
    trainer = _Training(tmp_path).trainer(one)
    trainer.validation_model = one.model
    with pytest.raises(ConfigurationError, match="one EMA only"):
        EMA(validate=True).attach(trainer)


# -- GradientStatistics -------------------------------------------------------------------------------


def test_statistics_equal_a_direct_computation() -> None:
    torch.manual_seed(1)
    tensors = [
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(7),
        torch.randn(2, 2).bfloat16(),
        torch.tensor(-5.0),
        torch.zeros(0),
        torch.sparse_coo_tensor([[0, 2]], [3.0, -4.0], (4,), check_invariants=True),
    ]
    found = statistics_of(tensors)
    assert [s.norm for s in found] == pytest.approx(
        [float(torch.linalg.vector_norm(t.to_dense().double())) for t in tensors]
    )
    assert found[3].max == 5.0
    assert found[3].mean == -5.0
    assert found[0].mean == pytest.approx(float(tensors[0].mean()))
    dense = torch.cat([t.to_dense().double().flatten() for t in tensors[:4]])
    total = combined(found[:4])
    assert total.norm == pytest.approx(float(dense.norm()))
    assert total.mean == pytest.approx(float(dense.mean()))
    assert total.max == float(dense.abs().max())
    assert total.nonfinite == 0
    assert total.elements == dense.numel()


def test_statistics_of_what_is_not_finite() -> None:
    poisoned, overflowing, fine = statistics_of(
        [torch.tensor([1.0, math.nan, math.inf, 2.0]), torch.full((4,), 3e38), torch.ones(4)]
    )
    assert poisoned.nonfinite == 0.5
    assert not math.isfinite(poisoned.norm)
    assert overflowing.nonfinite == 0
    assert overflowing.norm == pytest.approx(6e38)
    total = combined([poisoned, overflowing, fine])
    assert total.nonfinite == pytest.approx(2 / 12)
    assert math.isnan(total.max)


def test_gradients_are_logged_on_the_batches_asked_for(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    logged: list[dict[str, float]] = []
    expected: list[float] = []

    class Look(Callback):
        def on_batch_end(self, batch: int, metrics: Any) -> None:
            logged.append({k: v for k, v in metrics.items() if k.startswith("grad/")})

    trainer = _Training(tmp_path, epochs=1).trainer(GradientStatistics(every_batches=3), Look(), model=model)
    trainer.after(Trigger.BACKWARD)(lambda: expected.append(float(model.weight.grad.norm())))  # type: ignore[union-attr]
    trainer.fit()
    assert [len(values) for values in logged] == [12, 0, 0, 12, 0]
    for batch in (0, 3):
        values = logged[batch]
        assert values["grad/weight/norm"] == pytest.approx(expected[batch])
        assert values["grad/norm"] == pytest.approx(
            math.hypot(values["grad/weight/norm"], values["grad/bias/norm"])
        )
    assert trainer.history[0]["grad/weight/norm"] == pytest.approx((expected[0] + expected[3]) / 2)


def test_gradients_of_a_phase_are_those_of_its_optimizer(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 1)})

    def both(m: Any, batch: Any) -> torch.Tensor:
        return m["b"](m["a"](batch[0])).mean()  # type: ignore[no-any-return]

    phases = [Phase(name, SGD(model[name].parameters(), lr=0.1), both) for name in ("a", "b")]
    trainer = _Training(tmp_path, epochs=1).trainer(
        GradientStatistics(every_batches=1), model=model, optimizer=phases, forward=None
    )
    trainer.fit()
    norms = {name for name in trainer.history[0] if name.startswith("grad/") and name.endswith("norm")}
    assert norms == {
        *("grad/a/norm", "grad/a/a.weight/norm", "grad/a/a.bias/norm"),
        *("grad/b/norm", "grad/b/b.weight/norm", "grad/b/b.bias/norm"),
    }


def test_share_of_non_finite_gradients_is_logged(tmp_path: Path) -> None:
    statistics = GradientStatistics(every_batches=1, per_parameter=False)
    trainer = _Training(tmp_path, epochs=1, poisoned=1, nonfinite="skip").trainer(statistics)
    shares = []
    trainer.after(Trigger.BACKWARD)(lambda: shares.append(trainer.metrics["grad/nonfinite"]))
    trainer.fit()
    assert shares[0] == 0
    assert shares[1] > 0
    assert "grad/0.weight/norm" not in trainer.history[0]


# -- MemoryMonitor ------------------------------------------------------------------------------------


def test_memory_is_logged_on_the_batches_asked_for(tmp_path: Path) -> None:
    trainer = _Training(tmp_path, epochs=1).trainer(MemoryMonitor(every_batches=2))
    seen = []
    trainer.after(Trigger.END_BATCH)(lambda: seen.append(trainer.metrics.get("memory/rss_mb")))
    trainer.fit()
    assert [value is not None for value in seen] == [True, False, True, False, True]
    assert trainer.history[0]["memory/rss_mb"] == pytest.approx(
        psutil.Process().memory_info().rss / 1e6, rel=0.5
    )
    assert "memory/device_mb" not in trainer.history[0]


@pytest.mark.parametrize("callback", [GradientStatistics, MemoryMonitor])
def test_every_is_at_least_one(callback: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 batch"):
        callback(every_batches=0)


# -- all of them across a resume ----------------------------------------------------------------------


def _everything(model: nn.Module) -> tuple[list[Callback], SGD]:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    callbacks: list[Callback] = [
        LRScheduling(lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4 * BATCHES + 1), every="batch"),
        EMA(decay=0.9, validate=True, start=2, every_updates=2),
        EarlyStopping(patience=50, min_delta=100.0),
        GradientStatistics(every_batches=2),
        MemoryMonitor(every_batches=2),
    ]
    return callbacks, optimizer


def _final(trainer: Trainer, callbacks: list[Callback]) -> dict[str, Any]:
    ema, stopping = callbacks[1], callbacks[2]
    assert isinstance(ema, EMA)
    assert isinstance(stopping, EarlyStopping)
    unmeasured = ("duration", "memory/rss_mb")
    return {
        "weights": [p.tolist() for p in trainer.model.parameters()],
        "average": [p.tolist() for p in (*ema.model.parameters(), *ema.model.buffers())],
        "ema": (ema.updates, ema.n_averaged),
        "stopping": stopping.state_dict(),
        "scheduler": callbacks[0].scheduler.state_dict()["last_epoch"],  # type: ignore[attr-defined]
        "history": [{k: v for k, v in epoch.items() if k not in unmeasured} for epoch in trainer.history],
    }


PLACES = [
    (State.BATCH_END, 1),
    (State.BATCH_END, 7),
    (State.EPOCH_END, 2 * BATCHES),
    (State.BACKWARD, 4 * BATCHES - 1),
]


@pytest.mark.parametrize(("state", "batches"), PLACES)
def test_state_of_all_callbacks_survives_a_resume(tmp_path: Path, state: State, batches: int) -> None:
    training = _Training(tmp_path, epochs=4, val_loader=_loader(), checkpoint=None)

    def start(resume: bool | str, checkpoints: bool) -> tuple[Trainer, list[Callback]]:
        model = _model()
        callbacks, optimizer = _everything(model)
        trainer = training.trainer(
            *callbacks, model=model, optimizer=optimizer, checkpoint=Checkpointing() if checkpoints else None
        )
        trainer.start(resume)
        return trainer, callbacks

    unbroken, callbacks = start(False, checkpoints=False)
    unbroken.fit()
    expected = _final(unbroken, callbacks)
    assert expected["stopping"]["waited"] == 3

    broken, _ = start(False, checkpoints=True)
    while not (broken.batches == batches and broken.state is state):
        assert broken.advance() is not None
    broken.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's about the order of steps, above all
        resumed, callbacks = start("auto", checkpoints=True)
        resumed.fit()
    assert resumed.attempt == 2
    assert _final(resumed, callbacks) == expected


def test_first_step_after_a_resume_does_not_warn_of_the_order(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        model = _model()
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        return _Training(tmp_path, epochs=1, checkpoint=Checkpointing()).trainer(
            LRScheduling(scheduler), model=model, optimizer=optimizer
        )

    first = trainer()
    first.after(Trigger.END_BATCH)(lambda: first.halt("now") if first.batches == BATCHES else None)
    assert first.fit().state is State.HALTED
    assert first.history == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer().fit("auto").state is State.DONE
