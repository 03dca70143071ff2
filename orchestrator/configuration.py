"""What the arguments of Trainer mean, and every reason to refuse them before anything starts."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.checks import check_positive, check_whole
from orchestrator.callbacks.early_stopping import EarlyStopping
from orchestrator.callbacks.logs import Logging
from orchestrator.callbacks.lr_scheduling import LRScheduling
from orchestrator.errors import ConfigurationError, an, kind_of
from orchestrator.metrics import RESERVED, AccumulatingMetric
from orchestrator.numerics import PRECISIONS
from orchestrator.phase import Forward, Phase
from orchestrator.signatures import check_call, check_callback, is_ours
from orchestrator.work import supervised
from tracking.delivery import Tracker
from tracking.mlflow_delivery import MLflow
from tracking.runs import check_name

__all__ = [
    "UNSET",
    "Settings",
    "check",
    "check_destination",
    "check_schedulers",
    "restore_determinism",
    "set_determinism",
]

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "default"})()
"""Tells an argument that was not given from None, which turns a part off."""


@dataclass
class Settings:
    """The arguments of a Trainer, checked and with defaults filled in."""

    name: str
    named: bool
    """The name was given, not taken from the script."""
    root: Path
    device: torch.device
    phases: tuple[Phase, ...]
    forward: Forward | None
    metrics: Mapping[str, Any]
    validation_loaders: Mapping[str, Any]
    weigh: Callable[[Any, int], float] | None
    checkpoint: Checkpointing | None
    log: Logging | None
    track: Tracker | None
    max_time: float | None
    nonfinite: str
    deterministic: bool
    init_from: str | os.PathLike[str] | None
    binding: Mapping[str, Any]
    """What a checkpoint must agree with."""
    params: Mapping[str, Any]
    """What a tracker shows of the arguments."""
    _flags: dict[str, Any] = field(default_factory=dict)

    def evaluation_forward(self, name: str) -> Forward:
        """The forward of evaluation: `forward=`, or the one phase's."""
        if self.forward is not None:
            return self.forward
        if len(self.phases) == 1:
            return self.phases[0].forward
        raise ConfigurationError(
            f"evaluating {name!r} with several phases needs to know how: pass "
            "forward=(model, batch) -> loss, or (loss, outputs, targets)"
        )


def check(given: Mapping[str, Any]) -> Settings:
    """The settings for the arguments `given` to Trainer; raises ConfigurationError."""
    model, device = given["model"], _device(given["device"])
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is {kind_of(model)}; expected a torch.nn.Module")
    _check_numbers(given)
    _check_choices(given)
    loaders = _validation_loaders(given["val_loader"])
    if given["validate_every"] is not None and not loaders:
        raise ConfigurationError(
            f"validate_every is {given['validate_every']} with no val_loader (it is {given['val_loader']!r}); "
            "expected both or neither: pass val_loader=, or leave validate_every out"
        )
    forward = _forward(given)
    if given["forward"] is None and given["loss_fn"] is not None:
        for name, data in {"train_loader": given["train_loader"], **loaders}.items():
            _check_is_no_batch(name, data)
    phases = _phases(given["optimizer"], forward)
    _check_optimizers(model, phases)
    accumulate = given["accumulate"]
    if len(phases) > 1 and accumulate > 1:
        raise ConfigurationError(
            "accumulate with several phases is not possible: each phase steps every batch"
        )
    checkpoint = Checkpointing() if given["checkpoint"] is UNSET else given["checkpoint"]
    log = Logging() if given["log"] is UNSET else given["log"]
    track = MLflow() if given["track"] is UNSET else given["track"]
    for name, value, kind in (("checkpoint", checkpoint, Checkpointing), ("log", log, Logging)):
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(
                f"{name} is {value!r}; expected {an(kind.__name__)}, such as {kind.__name__}(), or None for none"
            )
    # A class has the attributes of its objects, so the protocol alone would take it.
    if track is not None and (isinstance(track, type) or not isinstance(track, Tracker)):
        raise ConfigurationError(f"track is {track!r}; expected a tracker such as MLflow(), or None for none")
    if (
        checkpoint is not None
        and checkpoint.durable == "remote"
        and (track is None or track.upload == "none")
    ):
        found = "track is None" if track is None else 'its tracker has upload="none"'
        raise ConfigurationError(
            f'Checkpointing(durable="remote") keeps what is not at the tracking server yet, but {found}; expected a '
            'tracker that uploads checkpoints, such as MLflow(upload="all")'
        )
    _check_callbacks(given["callbacks"])
    if given["scheduler"] is not None and not isinstance(given["scheduler"], LRScheduling):
        LRScheduling(given["scheduler"])  # refuses what cannot be scheduled
    watching = [given["scheduler"], *given["callbacks"], checkpoint]
    _check_watched(watching, loaders)
    metrics = _metrics(given["metrics"])
    _check_spelling(watching, loaders, ("loss", *metrics))
    name = given["name"]
    if name is not None:
        check_name(name)
    return Settings(
        name=name if name is not None else _script_name(),
        named=name is not None,
        root=Path(given["root"]),
        device=device,
        phases=phases,
        forward=forward,
        metrics=metrics,
        validation_loaders=loaders,
        weigh=_weigh(given["accumulate_weighting"]),
        checkpoint=checkpoint,
        log=log,
        track=track,
        max_time=given["max_time"],
        nonfinite=given["nonfinite"],
        deterministic=given["deterministic"],
        init_from=given["init_from"],
        binding=_binding(given, phases),
        params=_params(given, phases, device),
    )


def _device(device: Any) -> torch.device:
    if not isinstance(device, str) or device != "auto":
        return _usable(device)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _usable(device: Any) -> torch.device:
    """The device, after a look whether it can hold a tensor: no list of kinds knows every build of torch."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"device is {device!r}, which cannot be used here ({why}); expected {_devices()}"
        ) from error
    return found


def _devices() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = "".join(f', "cuda:{index}"' for index in range(count))
    return f'"auto", "cpu"{cuda}, or another device of torch that this machine has'


def _check_numbers(given: Mapping[str, Any]) -> None:
    if given["epochs"] is None and given["max_batches"] is None:
        raise ConfigurationError(
            "neither epochs nor max_batches is given; expected at least one, to know where to end"
        )
    check_whole("accumulate", given["accumulate"])
    for name in ("epochs", "max_batches", "validate_every"):
        check_whole(name, given[name], optional=True)
    check_positive("max_time", given["max_time"], unit="seconds", optional=True)
    check_positive("clip_grad_norm", given["clip_grad_norm"], optional=True)


def _check_choices(given: Mapping[str, Any]) -> None:
    if given["nonfinite"] not in ("halt", "skip"):
        raise ConfigurationError(f'nonfinite is {given["nonfinite"]!r}; expected "halt" or "skip"')
    if given["on_divergence"] not in ("warn", "halt"):
        raise ConfigurationError(f'on_divergence is {given["on_divergence"]!r}; expected "warn" or "halt"')
    if not isinstance(given["precision"], str) or given["precision"] not in PRECISIONS:
        raise ConfigurationError(
            f"precision is {given['precision']!r}; expected one of {', '.join(PRECISIONS)}"
        )
    if not isinstance(given["deterministic"], bool):
        raise ConfigurationError(f"deterministic is {given['deterministic']!r}; expected True or False")
    if given["init_from"] is not None and not isinstance(given["init_from"], str | os.PathLike):
        raise ConfigurationError(
            f"init_from is {given['init_from']!r}; expected the name or folder of a run, or the path of a "
            "checkpoint or of a file of weights"
        )
    if not isinstance(given["root"], str | os.PathLike):
        raise ConfigurationError(f"root is {given['root']!r}; expected the path of the folder of runs")


def _check_callbacks(callbacks: Any) -> None:
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise ConfigurationError(
            f"callbacks is {callbacks!r}; expected a list of orchestrator.Callback objects, [] for none"
        )
    seen: set[int] = set()
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"callbacks has {kind_of(callback) if isinstance(callback, type) else repr(callback)} in it; expected "
                "objects of classes derived from orchestrator.Callback"
            )
        check_callback(callback)
        for kind, argument in ((Checkpointing, "checkpoint"), (Logging, "log")):
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"callbacks has {an(kind.__name__)} in it; expected it on its own: pass it as {argument}="
                )
        if id(callback) in seen:
            raise ConfigurationError(
                f"callbacks has the same {type(callback).__name__} twice, so its hooks would run twice; "
                "expected each object once: leave one out, or make a second one"
            )
        seen.add(id(callback))


def _check_watched(callbacks: Sequence[Any], loaders: Collection[str]) -> None:
    """Refuse a metric "val/..." that nothing can give: there is no loader "val", and no callback of the user's."""
    if "val" in loaders or any(_is_users(callback) for callback in callbacks):
        return
    for callback in callbacks:
        metric = _watched(callback)
        if metric is not None and metric.split("/")[0] == "val" and "/" in metric:
            there = f"the loaders are {', '.join(loaders)}" if loaders else "there is no val_loader"
            raise ConfigurationError(
                f"{type(callback).__name__} watches {metric!r}, but {there}; expected a validation loader named "
                "'val': pass val_loader=, or watch a metric of training, of a loader there is, or one that you "
                'log under a name that does not begin with "val/"'
            )


def _check_spelling(callbacks: Sequence[Any], loaders: Collection[str], metrics: Sequence[str]) -> None:
    """Refuse "val_loss", as other libraries call it, before an epoch has been trained to find out."""
    if any(_is_users(callback) for callback in callbacks):
        return
    here = {f"{loader}_{metric}": f"{loader}/{metric}" for loader in loaders for metric in metrics}
    for callback in callbacks:
        metric = _watched(callback)
        if metric in here and metric not in metrics:
            raise ConfigurationError(
                f"{type(callback).__name__} watches {metric!r}; expected {here[metric]!r}, as it is called here"
            )


def _is_users(callback: Any) -> bool:
    """Whether it is of a class of the user's own, which may log any metric; see `Watched.read` for what then."""
    return isinstance(callback, Callback) and not is_ours(type(callback))


def _watched(callback: Any) -> str | None:
    """The name of the metric that a built-in callback decides by."""
    if isinstance(callback, EarlyStopping):
        return callback.watched.name
    if isinstance(callback, Checkpointing):
        return None if callback.best is None else callback.best.name
    return callback.monitor if isinstance(callback, LRScheduling) else None


def _forward(given: Mapping[str, Any]) -> Forward | None:
    forward, loss_fn = given["forward"], given["loss_fn"]
    if forward is not None:
        if not callable(forward):
            raise ConfigurationError(f"forward is {forward!r}; expected (model, batch) -> loss")
        _check_function("forward", forward, "model", "batch")
        if loss_fn is not None:
            raise ConfigurationError(
                "both loss_fn and forward are given; forward computes the loss: pass loss_fn=None"
            )
        return forward  # type: ignore[no-any-return]
    if loss_fn is None:
        if isinstance(given["optimizer"], Optimizer):
            raise ConfigurationError(
                "neither loss_fn nor forward is given; expected one, to compute the loss"
            )
        return None
    if not callable(loss_fn):
        raise ConfigurationError(f"loss_fn is {_listed(loss_fn)}; expected (outputs, targets) -> loss")
    _check_function("loss_fn", loss_fn, "outputs", "targets")
    return supervised(loss_fn)


def _check_is_no_batch(name: str, data: Any) -> None:
    """Refuse `(inputs, targets)` where batches are expected: of a validation it would be noticed an epoch later."""
    if isinstance(data, list | tuple) and data and all(isinstance(item, torch.Tensor) for item in data):
        what = name if name == "train_loader" else f"the validation loader {name!r}"
        raise ConfigurationError(
            f"{what} is a {type(data).__name__} of {len(data)} tensors; expected batches, each a pair (inputs, "
            "targets): DataLoader(TensorDataset(inputs, targets), batch_size=32), or [(inputs, targets)] for one"
        )


def _phases(optimizer: Any, forward: Forward | None) -> tuple[Phase, ...]:
    if isinstance(optimizer, Optimizer):
        assert forward is not None
        return (Phase("", optimizer, forward),)
    if (
        not isinstance(optimizer, Sequence)
        or not optimizer
        or not all(isinstance(p, Phase) for p in optimizer)
    ):
        raise ConfigurationError(
            f"optimizer is {_listed(optimizer)}; expected a torch.optim optimizer of this model's parameters, such as "
            "torch.optim.AdamW(model.parameters()), or for several a list of Phase(name, optimizer, forward)"
        )
    names = [phase.name for phase in optimizer]
    if len(set(names)) < len(names) or "" in names:
        raise ConfigurationError(
            f"the phases are named {names}; expected names that differ and are not empty"
        )
    return tuple(optimizer)


def _check_function(argument: str, given: Any, *arguments: str) -> None:
    """Refuse what does not take `arguments`, and a class, which makes an object where a value is expected."""
    if isinstance(given, type):
        raise ConfigurationError(
            f"{argument} is {kind_of(given)}; expected a function or an object: {given.__name__}(...) makes one"
        )
    check_call(argument, given, *arguments)


def _listed(given: Any) -> str:
    """What was given for an optimizer, in a line: the repr of one has many."""
    if isinstance(given, list | tuple) and given:
        return f"a {type(given).__name__} of {', '.join(kind_of(item) for item in given)}"
    return kind_of(given) if isinstance(given, type | nn.Module | Optimizer) else repr(given)


def _check_optimizers(model: nn.Module, phases: tuple[Phase, ...]) -> None:
    of_model = {id(parameter) for parameter in model.parameters()}
    for phase in phases:
        optimizer = phase.optimizer
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                "LBFGS evaluates the model several times within a step, which the machine cannot record; "
                "expected an optimizer that steps once, such as AdamW"
            )
        its_own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not its_own & of_model:
            where = f" of phase {phase.name!r}" if phase.name else ""
            raise ConfigurationError(
                f"the {type(optimizer).__name__}{where} has no parameter of this model; build it from "
                "model.parameters(), after the model is built and wrapped"
            )


def _metrics(metrics: Any) -> dict[str, Any]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f'metrics is {metrics!r}; expected a dict from name to metric, such as {{"accuracy": metric}}'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or name in RESERVED or "/" in name:
            raise ConfigurationError(
                f"a metric is named {name!r}; expected a string without a slash that is not one of interlock's own: "
                f"{', '.join(sorted(RESERVED))}"
            )
        if not isinstance(metric, AccumulatingMetric) and not callable(metric):
            raise ConfigurationError(
                f"metric {name!r} is {metric!r}; expected a torchmetrics object, or (outputs, targets) -> scalar"
            )
        _check_function(f"metric {name!r}", metric, "outputs", "targets")
    return dict(metrics)


def _validation_loaders(loaders: Any) -> dict[str, Any]:
    if loaders is None:
        return {}
    if isinstance(loaders, list | tuple) and any(isinstance(loader, DataLoader) for loader in loaders):
        raise ConfigurationError(
            f"val_loader is a {type(loaders).__name__} with DataLoaders in it; expected one loader, or a dict that "
            'names them: {"val": loader, "test": another}'
        )
    if not isinstance(loaders, Mapping):
        return {"val": loaders}
    for name in loaders:
        if not isinstance(name, str) or not name or "/" in name or name in ("train", "batch", "system"):
            raise ConfigurationError(
                f'val_loader has a loader named {name!r}; expected a name without a slash that is not "train", '
                '"batch" or "system"'
            )
    return dict(loaders)


def _weigh(weighting: Any) -> Callable[[Any, int], float] | None:
    if weighting == "batches":
        return None
    if weighting == "samples":
        return lambda batch, samples: float(samples)
    if callable(weighting):
        check_call("accumulate_weighting", weighting, "batch")
        return lambda batch, samples: float(weighting(batch))
    raise ConfigurationError(
        f'accumulate_weighting is {weighting!r}; expected "batches", "samples", or (batch) -> weight'
    )


def _script_name() -> str:
    script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] not in ("", "-c", "-m") else ""
    cleaned = "".join(c if c.isalnum() or c in "-_" else "-" for c in script).strip("-_")
    return cleaned or "run"


def _binding(given: Mapping[str, Any], phases: tuple[Phase, ...]) -> dict[str, Any]:
    """Arguments under which the same batches give the same weights."""
    weighting = given["accumulate_weighting"]
    return {
        "accumulate": given["accumulate"],
        "accumulate_weighting": weighting
        if isinstance(weighting, str)
        else getattr(weighting, "__name__", "callable"),
        "clip_grad_norm": given["clip_grad_norm"],
        "precision": given["precision"],
        "validate_every": given["validate_every"],
        "phases": [phase.name for phase in phases],
    }


def _params(given: Mapping[str, Any], phases: tuple[Phase, ...], device: torch.device) -> dict[str, Any]:
    model, loader = given["model"], given["train_loader"]
    params: dict[str, Any] = {
        "model": type(model).__name__,
        "model.parameters": sum(p.numel() for p in model.parameters() if not is_lazy(p)),
        "epochs": given["epochs"],
        "max_batches": given["max_batches"],
        "accumulate": given["accumulate"],
        "clip_grad_norm": given["clip_grad_norm"],
        "precision": given["precision"],
        "nonfinite": given["nonfinite"],
        "device": str(device),
        "batch_size": getattr(loader, "batch_size", None),
        "num_workers": getattr(loader, "num_workers", None),
    }
    loss_fn = given["loss_fn"]
    if loss_fn is not None:
        params["loss"] = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    for phase in phases:
        prefix = f"optimizer.{phase.name}" if phase.name else "optimizer"
        params[prefix] = type(phase.optimizer).__name__
        for key, value in phase.optimizer.defaults.items():
            if isinstance(value, bool | int | float | str | tuple) and value is not None:
                params[f"{prefix}.{key}"] = value
    if given["init_from"] is not None:
        params["init_from"] = os.fspath(given["init_from"])
    if given["config"] is not None:
        params["config"] = _config(given["config"])
    scheduler = given["scheduler"]
    if scheduler is not None:
        inner = scheduler.scheduler if isinstance(scheduler, LRScheduling) else scheduler
        params["scheduler"] = type(inner).__name__
    return {key: value for key, value in params.items() if value is not None}


def _config(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, Namespace):
        return vars(config)
    raise ConfigurationError(
        f"config is {config!r}; expected a dict, a dataclass object, or the Namespace that argparse gives"
    )


def check_schedulers(callbacks: Sequence[Callback]) -> None:
    """A scheduler has one owner: refuse one that is given twice."""
    seen: set[int] = set()
    for callback in callbacks:
        if not isinstance(callback, LRScheduling):
            continue
        if id(callback.scheduler) in seen:
            raise ConfigurationError(
                f"the {type(callback.scheduler).__name__} is given twice, so it would step twice; expected it once: "
                "in scheduler= or in an LRScheduling among the callbacks"
            )
        seen.add(id(callback.scheduler))


def check_destination(settings: Settings) -> None:
    """See that the tracker can say where it delivers to; raises TrackerError where that is no place."""
    if settings.track is not None:
        settings.track.destination()


def set_determinism(settings: Settings) -> None:
    """Turn torch's deterministic algorithms on if asked for; `restore_determinism` undoes it."""
    if not settings.deterministic or settings._flags:
        return
    settings._flags = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
    }
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def restore_determinism(settings: Settings) -> None:
    """Put torch's flags back."""
    flags, settings._flags = settings._flags, {}
    if flags:
        torch.use_deterministic_algorithms(flags["deterministic"], warn_only=flags["warn_only"])
        torch.backends.cudnn.benchmark = flags["benchmark"]
