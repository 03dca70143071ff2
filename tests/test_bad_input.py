"""Arguments that cannot be honoured are refused in words, before anything is written."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import trainings
from orchestrator import EMA, Callback, Checkpointing, EarlyStopping, Logging, LRScheduling, MLflow
from orchestrator.callbacks.gradient_statistics import GradientStatistics
from orchestrator.callbacks.memory_monitor import MemoryMonitor
from orchestrator.data.errors import DataError
from orchestrator.errors import ConfigurationError, LossError, an
from states.table import State
from tracking.journal import Journal
from tracking.runs import LeaseHeldError, RunNotFound, find_run

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
CUDA = torch.cuda.device_count()


class Mine(Callback):
    """What a user writes: gives the epoch a metric that it finds in its own way."""

    def on_epoch_end(self, epoch: int, metrics: Any) -> None:
        self.trainer.log("val/score", 1.0 / (epoch + 1))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def refused(root: Path, match: str, **options: Any) -> None:
    with pytest.raises((ConfigurationError, DataError), match=match) as found:
        trainings.make(root, **options)
    assert "expected" in str(found.value)
    assert list(root.iterdir()) == []


class Accuracy:
    """A metric as torchmetrics has them."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return accuracy(outputs, targets)


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


WRONG: list[tuple[str, Any, str]] = [
    # argument, value, what the message says
    ("callbacks", None, "callbacks is None; expected a list .* for none"),
    ("callbacks", 3, "callbacks is 3"),
    ("callbacks", "", "callbacks is ''"),
    ("callbacks", EMA(), "callbacks is <.*EMA.*expected a list"),
    ("callbacks", (c for c in [EMA()]), "callbacks is <generator"),
    ("callbacks", [EMA], "callbacks has the class EMA in it; expected objects"),
    ("callbacks", [EMA()] * 2, "the same EMA twice, so its hooks would run twice"),
    ("callbacks", [Checkpointing()], "has a Checkpointing in it.*pass it as checkpoint="),
    ("callbacks", [Logging()], "has a Logging in it.*pass it as log="),
    ("device", "cdua", "device is 'cdua', which cannot be used here"),
    ("device", None, "device is None, which cannot be used here"),
    ("device", f"cuda:{CUDA}", f"device is 'cuda:{CUDA}', which cannot be used here"),
    ("device", torch.device("cuda", CUDA), 'cannot be used here.*"auto", "cpu"'),
    ("track", 3, r"track is 3; expected a tracker such as MLflow\(\), or None"),
    ("track", MLflow, "track is <class"),
    (
        "loss_fn",
        nn.CrossEntropyLoss,
        r"loss_fn is the class CrossEntropyLoss; .*CrossEntropyLoss\(...\) makes one",
    ),
    ("forward", nn.Linear, "forward is the class Linear; expected a function or an object"),
    (
        "optimizer",
        lambda model: torch.optim.SGD,
        r"optimizer is the class SGD; expected .*AdamW\(model.parameters\(\)\)",
    ),
    ("optimizer", "adam", "optimizer is 'adam'; expected a torch.optim optimizer"),
    ("optimizer", [sgd()], r"optimizer is a list of an SGD; .*a list of Phase\(name, optimizer, forward\)"),
    (
        "train_loader",
        trainings.data(),
        r"training data is a TensorDataset; .*: DataLoader\(dataset, batch_size=32\)",
    ),
    ("train_loader", 3, "the training data is an int; expected a torch DataLoader"),
    ("train_loader", iter([]), "a list_iterator, an iterator, which can be gone through but once"),
    (
        "val_loader",
        [trainings.loader()],
        "val_loader is a list with DataLoaders in it; .* a dict that names them",
    ),
    ("log", "console", r"log is 'console'; expected a Logging, such as Logging\(\), or None"),
    ("metrics", [accuracy], 'expected a dict from name to metric, such as {"accuracy": metric}'),
    ("metrics", {"acc": Accuracy}, "metric 'acc' is the class Accuracy; expected a function or an object"),
    ("metrics", {1: accuracy}, "a metric is named 1; expected a string"),
    ("metrics", {"": accuracy}, "a metric is named ''; expected a string"),
    ("scheduler", 3, "scheduler=, was given an int"),
    ("scheduler", lr_scheduler.StepLR, "was given the class StepLR; expected a scheduler object"),
    ("deterministic", "no", "deterministic is 'no'; expected True or False"),
    ("deterministic", 1, "deterministic is 1"),
    ("deterministic", None, "deterministic is None"),
    ("accumulate", 2.0, "accumulate is 2.0; expected a whole number, at least 1"),
    ("accumulate", None, "accumulate is None"),
    ("epochs", True, "epochs is True"),
    ("max_batches", "9", "max_batches is '9'"),
    ("clip_grad_norm", True, "clip_grad_norm is True; expected a positive, finite number, or None for none"),
    ("clip_grad_norm", math.inf, "clip_grad_norm is inf"),
    ("clip_grad_norm", math.nan, "clip_grad_norm is nan"),
    ("clip_grad_norm", "1", "clip_grad_norm is '1'"),
    ("max_time", True, "max_time is True"),
    ("max_time", math.inf, "max_time is inf"),
    ("max_time", 0, "max_time is 0"),
    ("precision", ["fp32"], r"precision is \['fp32'\]; expected one of fp32"),
    ("root", 3, "root is 3; expected the path"),
]


@pytest.mark.parametrize(("argument", "value", "match"), WRONG)
def test_an_argument_that_is_wrong(argument: str, value: Any, match: str, tmp_path: Path) -> None:
    if argument == "root":
        with pytest.raises(ConfigurationError, match=match):
            trainings.make(value)
    else:
        refused(tmp_path, match, **{argument: value})


@without_cuda
def test_a_device_that_this_machine_has_not(tmp_path: Path) -> None:
    refused(tmp_path, "device is 'cuda', which cannot be used here", device="cuda")


@pytest.mark.parametrize("val_loader", [None, {}])
def test_validating_without_a_loader(val_loader: Any, tmp_path: Path) -> None:
    refused(tmp_path, "validate_every is 5 with no val_loader", val_loader=val_loader, validate_every=5)


PARTS: list[tuple[Callable[..., Callback], dict[str, Any], str]] = [
    (
        Checkpointing,
        {"keep_last": 1.5},
        "Checkpointing: keep_last is 1.5; expected a whole number, at least 1",
    ),
    (Checkpointing, {"keep_last": 0}, "keep_last is 0"),
    (Checkpointing, {"every_batches": True}, "every_batches is True"),
    (Checkpointing, {"every_epochs": "2"}, "every_epochs is '2'"),
    (Checkpointing, {"keep_every_epochs": -1}, "keep_every_epochs is -1"),
    (Checkpointing, {"every_seconds": "x"}, "every_seconds is 'x'; expected a positive, finite number"),
    (Checkpointing, {"every_seconds": math.nan}, "every_seconds is nan"),
    (Checkpointing, {"overhead": 1.0}, "overhead is 1.0; expected a share of the time between 0 and 1"),
    (Checkpointing, {"overhead": 0}, "overhead is 0"),
    (Checkpointing, {"overhead": True}, "overhead is True"),
    (Checkpointing, {"overhead": math.nan}, "overhead is nan"),
    (
        Checkpointing,
        {"overhead": 0.03, "every_batches": 100},
        "overhead=0.03 says how often batches are saved, and so does every_batches=100; expected one of them",
    ),
    (Checkpointing, {"overhead": 0.03, "every_seconds": 1.5}, "and so does every_seconds=1.5"),
    (Checkpointing, {"best": 3}, "the metric to watch is 3; expected the name"),
    (Checkpointing, {"best": 3, "mode": "min"}, "the metric to watch is 3"),
    (EarlyStopping, {"monitor": None}, "the metric to watch is None"),
    (EarlyStopping, {"patience": 1.5}, "patience is 1.5"),
    (EarlyStopping, {"patience": True}, "patience is True"),
    (EarlyStopping, {"min_delta": "x"}, "min_delta is 'x'"),
    (EarlyStopping, {"min_delta": math.inf}, "min_delta is inf"),
    (EMA, {"decay": "x"}, "decay is 'x'"),
    (EMA, {"decay": math.nan}, "decay is nan"),
    (EMA, {"every_updates": 0.5}, "every_updates is 0.5"),
    (EMA, {"start": -1}, "start is -1; expected a whole number, at least 0"),
    (GradientStatistics, {"every_batches": "x"}, "every_batches is 'x'"),
    (MemoryMonitor, {"every_batches": 2.0}, "every_batches is 2.0"),
]


@pytest.mark.parametrize(("part", "arguments", "match"), PARTS)
def test_a_part_that_makes_no_sense(
    part: Callable[..., Callback], arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigurationError, match=match) as found:
        part(**arguments)
    assert "expected" in str(found.value)


def plateau(monitor: Any) -> dict[str, Any]:
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LRScheduling(lr_scheduler.ReduceLROnPlateau(optimizer), monitor=monitor)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def test_a_scheduler_that_watches_no_name() -> None:
    with pytest.raises(ConfigurationError, match="monitor is 3; expected the name"):
        plateau(3)


WATCHING: dict[str, Callable[[str], dict[str, Any]]] = {
    "EarlyStopping": lambda metric: {"callbacks": [EarlyStopping(metric, mode="min")]},
    "Checkpointing": lambda metric: {"checkpoint": Checkpointing(best=metric, mode="min")},
    "LRScheduling": plateau,
}


@pytest.mark.parametrize("watcher", WATCHING)
@pytest.mark.parametrize("metric", ["val/loss", "val/accuracy"])
def test_watching_a_validation_that_there_is_not(watcher: str, metric: str, tmp_path: Path) -> None:
    refused(
        tmp_path,
        f"{watcher} watches '{metric}', but there is no val_loader.*pass val_loader=",
        **WATCHING[watcher](metric),
    )
    refused(
        tmp_path,
        f"{watcher} watches '{metric}', but the loaders are test, shifted;",
        val_loader={"test": trainings.loader(), "shifted": trainings.loader()},
        **WATCHING[watcher](metric),
    )


@pytest.mark.parametrize("watcher", WATCHING)
@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_watching_a_validation_by_the_name_it_has_elsewhere(watcher: str, name: str, tmp_path: Path) -> None:
    options = WATCHING[watcher](f"val_{name}")
    options |= {"metrics": {"accuracy": accuracy}, "val_loader": trainings.loader()}
    refused(tmp_path, f"{watcher} watches 'val_{name}'; expected 'val/{name}'", **options)


@pytest.mark.parametrize("watcher", WATCHING)
@pytest.mark.parametrize(
    ("metric", "more"),
    [
        ("val_loss", {"val_loader": trainings.loader(), "metrics": {"val_loss": accuracy}}),
        ("val_depth", {"val_loader": trainings.loader()}),
        ("val/loss", {"val_loader": trainings.loader()}),
        ("test/loss", {"val_loader": {"test": trainings.loader()}}),
        ("my/metric", {}),
        ("valley/depth", {}),
        ("loss", {}),
        ("val", {}),
    ],
)
def test_names_that_may_come_are_let_through(
    watcher: str, metric: str, more: dict[str, Any], tmp_path: Path
) -> None:
    trainings.make(tmp_path, **WATCHING[watcher](metric), **more)
    assert list(tmp_path.iterdir()) == []


def test_a_callback_of_the_users_may_log_what_is_watched(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/score", mode="max", patience=1)
    result = trainings.make(tmp_path, callbacks=[Mine(), stopping]).fit()
    assert "val/score has not improved" in result.reason


@pytest.mark.parametrize("options", [{"every_batches": "x"}, {"every_epochs": 0}, {"to": 3}, {"metrics": 3}])
def test_logging_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        Logging(**options)


cross_entropy = nn.functional.cross_entropy

LOSSES: list[tuple[str, Callable[..., Any], str]] = [
    # what gives it, what it gives, what the message says
    (
        "loss_fn",
        lambda outputs, targets: None,
        "loss_fn returned None as the loss; .*: does it end with a return",
    ),
    ("loss_fn", lambda outputs, targets: 0.5, r"loss_fn returned a float as the loss; .*leave out .item\(\)"),
    (
        "loss_fn",
        nn.CrossEntropyLoss(reduction="none"),
        r"loss_fn returned a loss of shape \(8,\).*with .mean\(\)",
    ),
    (
        "loss_fn",
        lambda outputs, targets: outputs.argmax(),
        r"shape \(\) and type torch.int64; .*not from an argmax",
    ),
    (
        "loss_fn",
        lambda outputs, targets: cross_entropy(outputs, targets).detach(),
        "loss_fn .*: was it detached",
    ),
    (
        "forward",
        lambda model, batch: {"loss": model(batch[0]).sum()},
        "forward returned a dict .*trainer.log",
    ),
    (
        "forward",
        lambda model, batch: (model(batch[0]).sum(), 1),
        "forward returned a tuple of 2; expected a loss, or",
    ),
]


@pytest.mark.parametrize(("argument", "function", "match"), LOSSES)
def test_what_is_no_loss(argument: str, function: Callable[..., Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(LossError, match=match) as found:
        trainings.make(tmp_path, **{argument: function}).fit()
    assert "expected" in str(found.value)


def test_a_loss_of_a_validation_that_is_none(tmp_path: Path) -> None:
    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return cross_entropy(outputs, targets) if torch.is_grad_enabled() else None

    with pytest.raises(LossError, match="loss_fn returned None as the loss"):
        trainings.make(tmp_path, loss_fn=loss_fn, val_loader=trainings.loader()).fit()


@pytest.mark.parametrize(
    ("batch", "found"),
    [(3, "an int"), ({"x": 1}, "a dict with keys 'x'"), ((1, 2, 3), "a tuple of length 3")],
)
def test_a_batch_that_is_no_pair(batch: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"the loader yields {found}; .* pass forward="):
        trainings.make(tmp_path, train_loader=[batch]).fit()


def test_a_training_loader_that_is_empty(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="the training loader has no batch in epoch 0, so nothing is trained"
    ) as told:
        result = trainings.make(tmp_path, train_loader=[], val_loader=[]).fit()
    assert sum("training loader" in str(one.message) for one in told) == 1  # of three epochs
    assert any("the val loader has no batch" in str(one.message) for one in told)
    with Journal.open(find_run(result.run)) as journal:
        assert any("nothing is trained" in record.message for record in journal.logs())


def test_ending_an_epoch_before_its_first_batch_is_not_taken_for_an_empty_loader(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.after("begin_epoch")(lambda: trainer.stop("enough"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit()
    assert trainer.batch == -1


def test_a_hook_that_cannot_be_called(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    for register in (trainer.before("step"), trainer.after("step"), trainer.on("DONE")):
        with pytest.raises(
            ConfigurationError, match="a hook is 3; expected a function that takes no argument"
        ):
            register(3)  # type: ignore[type-var]


def test_a_hook_that_takes_an_argument(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, max_batches=1)

    def look(engine: Any) -> None:
        raise AssertionError("it is not added")

    called = []
    for register in (trainer.before("step"), trainer.after("step"), trainer.on("DONE")):
        with pytest.raises(
            ConfigurationError, match=r"hook .*look takes \(engine: Any\); expected .* no argument"
        ):
            register(look)
        register(partial(called.append, 1))
        register(lambda value=2: called.append(value))
    trainer.fit()
    assert called == [1, 2] * 3


class TakesNothing(Callback):
    def on_train_end(self) -> None:  # type: ignore[override]
        raise AssertionError("after hours of training")


class LikeLightning(Callback):
    def on_train_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        raise AssertionError


class LikeKeras(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append((epoch, logs["loss"]))

    def on_batch_begin(self, *args: Any) -> None:
        self.seen.append((args[0], 0.0))


def test_hooks_of_a_callback_are_looked_at_before_they_are_called(tmp_path: Path) -> None:
    expected = r"expected def on_train_end\(self, metrics\)"
    refused(tmp_path, rf"TakesNothing.on_train_end takes \(\) .*; {expected}", callbacks=[TakesNothing()])
    refused(tmp_path, rf"takes \(trainer: Any, module: Any\) .*; {expected}", callbacks=[LikeLightning()])
    keras = LikeKeras()
    trainer = trainings.make(tmp_path, max_batches=1, callbacks=[keras])
    result = trainer.fit()
    assert keras.seen == [(0, 0.0), (0, result.history[0]["loss"])]


@pytest.mark.parametrize("name", ["on_train_batch_end", "on_validation_end", "on_after_backward"])
def test_a_callback_with_a_hook_that_is_never_called(name: str, tmp_path: Path) -> None:
    kind = type("Elsewhere", (Callback,), {name: lambda self, *args: None})
    refused(
        tmp_path,
        f"Elsewhere.{name} is a hook of other trainers and would never be called",
        callbacks=[kind()],
    )


@pytest.mark.parametrize("name", [3, "", None])
def test_logging_by_what_is_no_name(name: Any, tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.after("forward")(lambda: trainer.log(name, 1.0))
    with pytest.raises(ConfigurationError, match=r"log\(.*\): expected a name, a string"):
        trainer.fit()


def test_resuming_from_a_file_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(trainings.network().state_dict(), file)
    with pytest.raises(ConfigurationError, match=r"weights.pt', a file; expected .*init_from="):
        trainings.make(tmp_path).fit(resume=file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("by", ["fit", "advance", "hook"])
def test_a_warning_points_at_the_users_line(by: str, tmp_path: Path) -> None:
    """However many frames of ours lie between: here an empty batch, and a scheduler that ends too early."""
    empty = (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    trainer = trainings.make(tmp_path, train_loader=[empty])
    if by == "hook":  # a hook of the user's that leads to one is nearer than `fit`
        trainer.before("fetch")(lambda: trainer._training.work._tell("batch 7 is empty"))
    go = partial(trainer.advance, "BATCH_END") if by == "advance" else trainer.fit
    with pytest.warns(UserWarning, match="is empty") as told:
        go()
    trainer.close()
    assert {one.filename for one in told} == {__file__}


def test_articles() -> None:
    nouns = ("int", "SGD", "ndarray", "UNet", "Tensor", "EMA", "NAdam", "ReLU", "Adam", "x")
    assert [an(noun).split()[0] for noun in nouns] == ["an", "an", "an", "a", "a", "an", "an", "a", "an", "a"]


# -- functions and hooks -----------------------------------------------------------------------------------


class TooFew(Callback):
    def on_epoch_end(self, metrics: Any) -> None:  # type: ignore[override]
        pass


class TooMany(Callback):
    def on_batch_begin(self, batch: int, data: Any) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"loss_fn": lambda outputs: outputs.sum()},
            r"loss_fn takes \(outputs\); expected \(outputs, targets\)",
        ),
        ({"loss_fn": lambda outputs, targets, weights: 0}, "missing a required argument: 'weights'"),
        ({"forward": lambda batch: 0}, r"forward takes \(batch\); expected \(model, batch\)"),
        (
            {"metrics": {"m": lambda outputs: 0}},
            r"metric 'm' takes \(outputs\); expected \(outputs, targets\)",
        ),
        ({"accumulate_weighting": lambda: 1.0}, r"accumulate_weighting takes \(\); expected \(batch\)"),
        (
            {"callbacks": [TooFew()]},
            r"TooFew\.on_epoch_end takes \(metrics: .*expected .*\(self, epoch, metrics\)",
        ),
        ({"callbacks": [TooMany()]}, r"TooMany\.on_batch_begin takes \(batch: .*expected .*\(self, batch\)"),
    ],
)
def test_a_function_that_cannot_be_called_as_it_will_be(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(tmp_path, match, **options)


def test_functions_that_can_be_called_are_let_through(tmp_path: Path) -> None:
    def decorated(*everything: Any) -> Any:
        return nn.functional.cross_entropy(*everything)

    decorated.__wrapped__ = lambda only: only  # type: ignore[attr-defined]
    metrics = {
        "partial": partial(lambda scale, outputs, targets: scale, 2.0),
        "default": lambda outputs, targets, k=1: k,
        "builtin": max,
    }
    trainings.make(tmp_path, loss_fn=decorated, metrics={k: metrics[k] for k in ("partial", "default")})
    trainings.make(tmp_path, metrics=metrics)


def test_a_method_that_looks_like_a_hook_is_told_of(tmp_path: Path) -> None:
    class Typo(Callback):
        def on_end_of_batch(self, batch: int, metrics: Any) -> None:
            pass

    class Own(Callback):
        def attach(self, trainer: Any) -> None:
            super().attach(trainer)
            trainer.after("backward")(self.on_after_backward)

        def on_after_backward(self) -> None:
            pass

    with pytest.warns(UserWarning, match=r"Typo\.on_end_of_batch is no hook.*expected one of .*on_batch_end"):
        trainings.make(tmp_path, callbacks=[Typo()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainings.make(tmp_path, callbacks=[Own(), EMA(0.9), Mine()], checkpoint=Checkpointing())


@pytest.mark.parametrize("name", ["train_loader", "val_loader"])
def test_a_pair_of_tensors_is_one_batch_and_no_loader(name: str, tmp_path: Path) -> None:
    pair = (torch.zeros(8, 6), torch.zeros(8, dtype=torch.long))
    said = "train_loader" if name == "train_loader" else "the validation loader 'val'"
    refused(tmp_path, f"{said} is a tuple of 2 tensors; expected batches", **{name: pair})
    trainings.make(tmp_path, **{name: [pair]})


def test_an_optimizer_where_the_loss_belongs(tmp_path: Path) -> None:
    refused(tmp_path, "loss_fn is an SGD; expected", loss_fn=sgd())


@pytest.mark.parametrize(
    ("argument", "made_for", "every"),
    [("total_steps", 18, "epoch"), ("T_max", 18, "epoch"), ("T_max", 3, "batch")],
)
def test_a_schedule_in_the_other_unit_is_told_of(
    argument: str, made_for: int, every: Any, tmp_path: Path
) -> None:
    def trainer(root: Path, steps: int, every: Any) -> Any:
        model = trainings.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = (
            lr_scheduler.CosineAnnealingLR(optimizer, steps)
            if argument == "T_max"
            else lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        )
        return trainings.make(
            root, model=model, optimizer=optimizer, scheduler=LRScheduling(scheduler, every)
        )

    other = "batch" if every == "epoch" else "epoch"
    right = 3 if every == "epoch" else 18
    told = f'{argument}={made_for}, but is stepped by {every}, {right} times.*every="{other}".*{argument}={right}'
    with pytest.warns(UserWarning, match=told):
        trainer(tmp_path / "wrong", made_for, every).fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path / "unit", made_for, other).fit()
        trainer(tmp_path / "length", right, every).fit()


# -- folders -----------------------------------------------------------------------------------------------


def test_resuming_from_a_folder_of_something_else(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path / "runs", epochs=1)
    trainer.fit()
    other = tmp_path / "other"
    other.mkdir()
    for folder in (other, trainer.run.checkpoints):
        with pytest.raises(
            RunNotFound, match=f"'{folder}' is a folder, but no run's: it has no journal.sqlite"
        ):
            trainings.make(tmp_path / "runs").fit(resume=folder)
    (other / "manifest.json").touch()
    with pytest.raises(
        RunNotFound, match=f"'{other}', a folder with a manifest.json, but not in a run's folder"
    ):
        trainings.make(tmp_path / "runs").fit(resume=other)


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as first:
        first.advance()
        with pytest.raises(
            LeaseHeldError, match=r"held by this very process.*Close the Trainer.*trainer\.close"
        ):
            trainings.make(tmp_path).fit(resume="auto")
    assert trainings.make(tmp_path).fit(resume="auto").state is State.DONE
