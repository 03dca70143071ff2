"""The state of an optimizer by parameter name, set without the casts that load_state_dict makes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Optimizer

from orchestrator.snapshot.differences import Comparison, UnsupportedStateError, describe, refuse
from orchestrator.snapshot.tensors import copied, overwrite, replica, replicas

__all__ = [
    "SCHEDULERS_OWN",
    "capture_optimizer",
    "compare_optimizer",
    "follow_parameters",
    "outside_parameters",
    "restore_optimizer",
]

Tree = dict[str, Any]
Names = Mapping[Tensor, str]

# Names are the module's business, and differ with what is wrapped around it.
_NOT_SETTINGS = frozenset({"params", "param_names"})

# Scalars that torch's optimizers keep on the CPU beside parameters on a device, unless fused or capturable.
_SCALARS = frozenset({"step", "mu_product"})
_HOST = torch.device("cpu")

SCHEDULERS_OWN = frozenset({"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"})
"""Entries that schedulers add to the groups; where one cycles momentum, that is no longer as constructed."""

_CYCLED = frozenset({"momentum", "betas"})


def capture_optimizer(optimizer: Optimizer, names: Names) -> Tree:
    """The state of `optimizer`; `names` are those of the model's parameters, from `parameter_names`.

    Keys: `class`; `groups`, each with the names of its `parameters` and its `settings`, every
    hyper-parameter; `state` by parameter name; `shared`, state that is not a parameter's; `parameters`, the
    values of those that are not the model's, named `optimizer/group0/param3`; `defaults`, the constructor's
    hyper-parameters. Tensors are references to the live ones.

    Raises UnsupportedStateError for an optimizer whose state is not all in `state` and `param_groups`.
    """
    _check_supported(optimizer)
    outside = outside_parameters(optimizer, names)
    named = _with_outside(names, outside)
    if any(isinstance(key, Tensor) and key not in named for key in optimizer.state):
        raise UnsupportedStateError(
            f"{type(optimizer).__qualname__} has state of a tensor that is in none of its parameter groups, so it "
            "has no name; expected state of its parameters only: delete the entry from `optimizer.state`"
        )
    return {
        "class": type(optimizer).__qualname__,
        "groups": [
            {"parameters": [named[p] for p in group["params"]], "settings": copied(_settings(group))}
            for group in optimizer.param_groups
        ],
        "state": {named[p]: _plain(state) for p, state in optimizer.state.items() if isinstance(p, Tensor)},
        "shared": {key: _plain(s) for key, s in optimizer.state.items() if not isinstance(key, Tensor)},
        "parameters": {name: parameter.detach() for name, parameter in outside.items()},
        "defaults": copied(optimizer.defaults),
    }


def _check_supported(optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if isinstance(optimizer, LBFGS):
        raise UnsupportedStateError(
            "LBFGS evaluates the model several times within a step and keeps lists of past directions, which "
            "cannot be captured between its evaluations; expected an optimizer that steps once, such as AdamW"
        )
    if kind.state_dict is not Optimizer.state_dict:
        raise UnsupportedStateError(
            f"{kind.__qualname__} has a state_dict of its own, so some of its state is outside `state` and "
            "`param_groups` and would be lost; expected an optimizer that keeps everything there"
        )


def _settings(group: Mapping[str, Any]) -> Tree:
    return {key: value for key, value in group.items() if key not in _NOT_SETTINGS}


def _plain(state: Any) -> Any:
    return copied(dict(state)) if isinstance(state, dict) else copied(state)


def outside_parameters(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """What `optimizer` trains beside the parameters in `names` (learnable weights of a loss), by name."""
    return {
        f"optimizer/group{i}/param{j}": parameter
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
        if parameter not in names
    }


def _with_outside(names: Names, outside: Mapping[str, Tensor]) -> dict[Tensor, str]:
    return {**names, **{parameter: name for name, parameter in outside.items()}}


def restore_optimizer(
    optimizer: Optimizer, tree: Mapping[str, Any], names: Names, *, override: Collection[str] = ()
) -> None:
    """Make `optimizer` what it was when `tree` was captured; live tensors are written in place.

    Dtypes and strides are the captured ones, whatever the parameter's are. Hyper-parameters are the
    checkpoint's, but for those named in `override`, which stay as constructed.

    Raises IncompatibleStateError, before anything is changed, where class, groups or names differ.
    """
    _check_supported(optimizer)
    refuse("the optimizer", _incompatibilities(optimizer, tree, names))
    outside = outside_parameters(optimizer, names)
    for name, saved in tree["parameters"].items():
        live = outside[name]
        if not overwrite(live, saved):
            live.data = replica(saved, live.device)
    kept = set(override) | ({"initial_lr"} if "lr" in override else set())
    named = _with_outside(names, outside)
    _restore_state(optimizer, tree, named)
    for group, saved_group in zip(optimizer.param_groups, tree["groups"], strict=True):
        _restore_settings(group, saved_group["settings"], kept)
    _restore_settings(optimizer.defaults, tree["defaults"], kept)


def _restore_state(optimizer: Optimizer, tree: Mapping[str, Any], named: Names) -> None:
    live = dict(optimizer.state)
    optimizer.state.clear()
    for key, saved in tree["shared"].items():
        optimizer.state[key] = replicas(saved, _HOST)
    for group, saved_group in zip(optimizer.param_groups, tree["groups"], strict=True):
        scalars_follow = _scalars_follow(optimizer, saved_group["settings"])
        for parameter in group["params"]:
            saved = tree["state"].get(named[parameter])
            if saved is not None:
                before = live.get(parameter, {})
                optimizer.state[parameter] = {
                    key: _value(
                        value,
                        before.get(key),
                        parameter.device if scalars_follow or key not in _SCALARS else _HOST,
                    )
                    for key, value in saved.items()
                }


def _scalars_follow(optimizer: Optimizer, settings: Mapping[str, Any]) -> bool:
    """Whether counts of steps are where the parameters are."""
    return bool(settings.get("capturable") or settings.get("fused") or isinstance(optimizer, ASGD))


def follow_parameters(optimizer: Optimizer) -> None:
    """Move what state `optimizer` has, as that which Adagrad makes at once, to where its parameters were moved."""
    for group in optimizer.param_groups:
        scalars_follow = _scalars_follow(optimizer, group)
        for parameter in group["params"]:
            state: Any = optimizer.state.get(parameter)
            if isinstance(state, dict):
                for key, value in state.items():
                    if isinstance(value, Tensor) and (scalars_follow or key not in _SCALARS):
                        state[key] = value.to(parameter.device)


def _value(saved: Any, live: Any, device: torch.device) -> Any:
    """The live tensor with the saved values if it can take them, or else a new one."""
    if isinstance(saved, Tensor) and isinstance(live, Tensor):
        return live if overwrite(live, saved) else replica(saved, live.device)
    return replicas(saved, device)


def _restore_settings(group: dict[str, Any], settings: Mapping[str, Any], kept: Collection[str]) -> None:
    for key, saved in settings.items():
        if key not in kept:
            group[key] = _value(saved, group.get(key), _HOST)


def compare_optimizer(optimizer: Optimizer, tree: Mapping[str, Any], names: Names) -> Comparison:
    """What of `tree` does not fit `optimizer`, and which hyper-parameters it was given other values for.

    A hyper-parameter that a scheduler moves is compared by the value that it was constructed with.
    """
    incompatible = tuple(_incompatibilities(optimizer, tree, names))
    return Comparison(incompatible, () if incompatible else tuple(_changed(optimizer, tree)))


def _incompatibilities(optimizer: Optimizer, tree: Mapping[str, Any], names: Names) -> Iterator[str]:
    kind = type(optimizer).__qualname__
    if kind != tree["class"]:
        yield f"optimizer: checkpoint has {tree['class']}, the trainer has {kind}"
        return
    live, saved = optimizer.param_groups, tree["groups"]
    if len(live) != len(saved):
        yield f"optimizer {kind}: checkpoint has {len(saved)} parameter groups, the trainer's has {len(live)}"
        return
    outside = outside_parameters(optimizer, names)
    named = _with_outside(names, outside)
    for index, (group, saved_group) in enumerate(zip(live, saved, strict=True)):
        here, there = [named[p] for p in group["params"]], saved_group["parameters"]
        where = f"optimizer {kind}, parameter group {index}"
        yield from (f"{where}: only the checkpoint's has {name!r}" for name in there if name not in here)
        yield from (f"{where}: only the trainer's has {name!r}" for name in here if name not in there)
    for name, value in tree["parameters"].items():
        parameter = outside.get(name)
        if parameter is not None and (parameter.shape, parameter.dtype) != (value.shape, value.dtype):
            yield f"{name}: checkpoint has {describe(value)}, the optimizer has {describe(parameter)}"


def _changed(optimizer: Optimizer, tree: Mapping[str, Any]) -> Iterator[str]:
    single = len(optimizer.param_groups) == 1
    for index, (group, saved_group) in enumerate(zip(optimizer.param_groups, tree["groups"], strict=True)):
        live, saved = _settings(group), saved_group["settings"]
        for key in saved:
            if key not in live or not _constructed(key, live, saved):
                continue
            shown = _as_constructed(key, live, saved)
            if not _same(*shown) and not _moved_by_hand(key, live, optimizer.defaults, tree["defaults"]):
                where = "" if single else f" of parameter group {index}"
                given, there = map(_show, shown)
                yield f"{key}{where}: checkpoint has {there}, the optimizer was given {given}"


def _constructed(key: str, live: Tree, saved: Tree) -> bool:
    """Whether the optimizer's constructor gave the value, and no scheduler hides which it was."""
    cycled = key in _CYCLED and "max_momentum" in live and "max_momentum" in saved
    return key not in SCHEDULERS_OWN and not cycled


def _as_constructed(key: str, live: Tree, saved: Tree) -> tuple[Any, Any]:
    """The two values to compare: those from before a scheduler moved them, if one did."""
    if key == "lr" and "initial_lr" in live and "initial_lr" in saved:
        key = "initial_lr"
    return live[key], saved[key]


def _moved_by_hand(
    key: str, live: Tree, defaults: Mapping[str, Any], saved_defaults: Mapping[str, Any]
) -> bool:
    """Whether only the training itself, without a scheduler, can have changed the value."""
    if key not in defaults or key not in saved_defaults:
        return False
    return _same(live[key], defaults[key]) and _same(defaults[key], saved_defaults[key])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a = a.tolist() if isinstance(a, Tensor) else a
        b = b.tolist() if isinstance(b, Tensor) else b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)


def _show(value: Any) -> str:
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)
