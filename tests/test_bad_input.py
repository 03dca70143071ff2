"""Arguments that cannot be honoured are refused in words, before anything is written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import trainings
from orchestrator import EMA, Callback, Checkpointing, EarlyStopping, Logging, LRScheduling, MLflow
from orchestrator.callbacks.gradient_statistics import GradientStatistics
from orchestrator.callbacks.memory_monitor import MemoryMonitor
from orchestrator.errors import ConfigurationError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
CUDA = torch.cuda.device_count()


class Mine(Callback):
    """What a user writes: gives the epoch a metric that it finds in its own way."""

    def on_epoch_end(self, epoch: int, metrics: Any) -> None:
        self.trainer.log("val/score", 1.0 / (epoch + 1))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def refused(root: Path, match: str, **options: Any) -> None:
    with pytest.raises(ConfigurationError, match=match) as found:
        trainings.make(root, **options)
    assert "expected" in str(found.value)
    assert list(root.iterdir()) == []


WRONG: list[tuple[str, Any, str]] = [
    # argument, value, what the message says
    ("callbacks", None, "callbacks is None; expected a list .* for none"),
    ("callbacks", 3, "callbacks is 3"),
    ("callbacks", "", "callbacks is ''"),
    ("callbacks", EMA(), "callbacks is <.*EMA.*expected a list"),
    ("callbacks", (c for c in [EMA()]), "callbacks is <generator"),
    ("callbacks", [EMA], "callbacks has <class .*EMA'> in it; expected objects"),
    ("callbacks", [EMA()] * 2, "the same EMA twice, so its hooks would run twice"),
    ("callbacks", [Checkpointing()], "has a Checkpointing in it.*pass it as checkpoint="),
    ("callbacks", [Logging()], "has a Logging in it.*pass it as log="),
    ("device", "cdua", "device is 'cdua', which cannot be used here"),
    ("device", None, "device is None, which cannot be used here"),
    ("device", f"cuda:{CUDA}", f"device is 'cuda:{CUDA}', which cannot be used here"),
    ("device", torch.device("cuda", CUDA), 'cannot be used here.*"auto", "cpu"'),
    ("track", 3, r"track is 3; expected a tracker such as MLflow\(\), or None"),
    ("track", MLflow, "track is <class"),
    ("metrics", {1: accuracy}, "a metric is named 1; expected a string"),
    ("metrics", {"": accuracy}, "a metric is named ''; expected a string"),
    ("scheduler", 3, "scheduler=, was given a int"),
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
    (EMA, {"every": 0.5}, "every is 0.5"),
    (EMA, {"start": -1}, "start is -1; expected a whole number, at least 0"),
    (GradientStatistics, {"every": "x"}, "every is 'x'"),
    (MemoryMonitor, {"every": 2.0}, "every is 2.0"),
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
@pytest.mark.parametrize(
    ("metric", "more"),
    [
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
