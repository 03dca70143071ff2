"""The state of schedulers and gradient scalers, as plain values without functions or optimizers."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.snapshot.differences import Comparison, refuse
from orchestrator.snapshot.tensors import copied, replicas

__all__ = [
    "capture_scaler",
    "capture_scheduler",
    "compare_scheduler",
    "given_settings",
    "restore_scaler",
    "restore_scheduler",
]

Tree = dict[str, Any]

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    partial,
)

# What stepping changes; all other public attributes are what the constructor was given.
_PROGRESS = frozenset(
    {
        "last_epoch",
        "best",
        "num_bad_epochs",
        "cooldown_counter",
        "T_cur",
        "T_i",
        "base_lrs",
        "lr_lambdas",
        "mode_worse",
    }
)


def capture_scheduler(scheduler: LRScheduler) -> Tree:
    """The state of any torch scheduler: its `class`, `state`, and schedulers that are attributes (`inner`).

    Functions and optimizers are left out, as torch leaves out LambdaLR's functions: they are the script's.
    """
    state = scheduler.state_dict()
    return {
        "class": type(scheduler).__qualname__,
        "state": {
            key: _data(value)
            for key, value in state.items()
            if not isinstance(value, (LRScheduler, Optimizer, *_CODE))
        },
        "inner": {key: capture_scheduler(v) for key, v in state.items() if isinstance(v, LRScheduler)},
    }


def _data(value: Any) -> Any:
    """A copy of `value`; entries of dicts that are code are left out."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        kept = {key: _data(item) for key, item in value.items() if not isinstance(item, (Optimizer, *_CODE))}
        if type(value) is dict:
            return kept
        copy = value.copy()  # a Counter stays one
        copy.clear()
        copy.update(kept)
        return copy
    if type(value) in (list, tuple, set):
        return type(value)(_data(item) for item in value)
    return value


def restore_scheduler(scheduler: LRScheduler, tree: Mapping[str, Any]) -> None:
    """Put `scheduler` where it was; the learning rates themselves are the optimizer's state.

    Raises IncompatibleStateError where it is of another class.
    """
    refuse("the scheduler", compare_scheduler(scheduler, tree).incompatible)
    # torch keeps references to what it is given, and takes keys out of it for a while.
    scheduler.load_state_dict(replicas(tree["state"]))
    for key, inner in tree["inner"].items():
        restore_scheduler(getattr(scheduler, key), inner)


def compare_scheduler(scheduler: LRScheduler, tree: Mapping[str, Any]) -> Comparison:
    """Whether `scheduler` is of the captured class, and which values it was constructed with that differ."""
    return Comparison(tuple(_incompatibilities(scheduler, tree)), tuple(_changed(scheduler, tree)))


def _incompatibilities(scheduler: LRScheduler, tree: Mapping[str, Any]) -> Iterator[str]:
    yield from _mismatches(capture_scheduler(scheduler), tree)


def _mismatches(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    if live["class"] != saved["class"]:
        yield f"scheduler: checkpoint has {saved['class']}, the trainer has {live['class']}"
        return
    parts = len(saved["state"].get("_schedulers", ())), len(live["state"].get("_schedulers", ()))
    if parts[0] != parts[1]:
        yield f"scheduler {live['class']}: checkpoint has {parts[0]} inside, the trainer's has {parts[1]}"
    for key in sorted(live["inner"].keys() | saved["inner"].keys()):
        if key not in live["inner"] or key not in saved["inner"]:
            yield f"scheduler {live['class']}: only one of both has a scheduler as its {key!r}"
        else:
            yield from _mismatches(live["inner"][key], saved["inner"][key])


def _changed(scheduler: LRScheduler, tree: Mapping[str, Any]) -> Iterator[str]:
    live = capture_scheduler(scheduler)
    if live["class"] == tree["class"]:
        kept = {key: value for key, value in tree["state"].items() if _may_be_given(scheduler, key)}
        yield from _changed_values(live["class"], live["state"], kept)


def _may_be_given(scheduler: LRScheduler, key: str) -> bool:
    """Whether a constructor can have given the attribute; a user's class may move any that it did not take."""
    constructors = [vars(cls)["__init__"] for cls in type(scheduler).__mro__ if "__init__" in vars(cls)]
    of_torch = type(scheduler).__module__.startswith("torch.")
    return of_torch or any(key in inspect.signature(init).parameters for init in constructors)


def _changed_values(kind: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for key, value in saved.items():
        if key == "_schedulers":
            for number, (one, other) in enumerate(zip(live.get(key, ()), value, strict=False)):
                yield from _changed_values(f"{kind}, scheduler {number}", one, other)
        elif key in live and _is_given(key) and not _equal(live[key], value):
            yield f"{key} of {kind}: checkpoint has {value!r}, the scheduler was given {live[key]!r}"


def given_settings(state: Mapping[str, Any]) -> list[str]:
    """The names of what the constructor of a captured scheduler was given, and of those inside it."""
    inner = [name for part in state.get("_schedulers", ()) for name in given_settings(part)]
    return [key.lstrip("_") for key in state if _is_given(key)] + inner


def _is_given(key: str) -> bool:
    return key == "_milestones" or not (key.startswith("_") or key in _PROGRESS)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) or (a != a and b != b)


def capture_scaler(scaler: torch.amp.GradScaler) -> Tree:
    """The scale and growth of a gradient scaler; empty for one that is not enabled. Waits for the device."""
    return dict(copied(scaler.state_dict()))


def restore_scaler(
    scaler: torch.amp.GradScaler, tree: Mapping[str, Any], device: torch.device | None = None
) -> None:
    """Give `scaler` the captured scale and growth, on `device` (default: the CPU).

    Raises IncompatibleStateError where only one of both is enabled.
    """
    if scaler.is_enabled() != bool(tree):
        on = "is" if scaler.is_enabled() else "is not"
        refuse(
            "the gradient scaler",
            [f"the scaler {on} enabled, the checkpoint's was {'on' if tree else 'off'}"],
        )
    if tree:
        scaler.load_state_dict(dict(tree))
        # Its tensors are made by the first scale(), which a training that goes on from BACKWARD would not call.
        scaler.scale(torch.zeros((), device=device))
