"""The tree of a checkpoint made to fit a trainer that differs: pure functions of the saved tree and the live one.

The live tree is what `TrainingState.constructed` gives. What comes out is restored like any checkpoint's tree,
and verified like one; nothing here changes what it is given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.snapshot.optimizers import SCHEDULERS_OWN

__all__ = [
    "fitted_average",
    "fitted_data",
    "fitted_metrics",
    "fitted_module",
    "fitted_optimizer",
    "kept_parameters",
    "with_new_entries",
    "with_rates_of",
    "with_setting",
]

Tree = dict[str, Any]

_CYCLED = ("momentum", "betas")
_DERIVED = {"total_steps": "_schedule_phases", "mode": "mode_worse"}
"""What the constructor of a scheduler works out from an argument and keeps beside it."""


# -- another model -------------------------------------------------------------------------------------


def fitted_module(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Tree:
    """The tree of the live module with all of the saved one's that matches.

    A tensor matches by name, shape and dtype; what is kept by module, by path and class.
    """
    same = {path for path, kind in live["types"].items() if saved["types"].get(path) == kind}
    kept = kept_parameters(saved, live)
    fitted = {key: _by_path(saved.get(key), entry, same) for key, entry in live.items()}
    fitted["parameters"] = {n: _matching(saved, n, tensor) for n, tensor in live["parameters"].items()}
    lazy = {name.rpartition(".")[0] for name, tensor in live["parameters"].items() if tensor is None}
    fitted["buffers"] = {
        name: None
        if tensor is None and name.rpartition(".")[0] not in lazy
        else _matching(saved, name, tensor)
        for name, tensor in live["buffers"].items()
    }
    frozen = live["requires_grad"]
    fitted["requires_grad"] = {
        name: saved["requires_grad"].get(name, needs) if live["aliases"].get(name, name) in kept else needs
        for name, needs in frozen.items()
    }
    return {**fitted, **{key: live[key] for key in ("aliases", "non_persistent", "types")}}


def _by_path(saved: Any, live: Any, same: Collection[str]) -> Any:
    """The saved entries of modules that are of the same class, the live ones of all others."""
    if not isinstance(live, Mapping) or not isinstance(saved, Mapping):
        return live
    return {path: saved[path] if path in same and path in saved else entry for path, entry in live.items()}


def kept_parameters(saved: Mapping[str, Any], live: Mapping[str, Any]) -> set[str]:
    """The names of the live module's parameters that the saved one has with the same shape and dtype."""
    return {name for name, tensor in live["parameters"].items() if _match(_tensor(saved, name), tensor)}


def _matching(saved: Mapping[str, Any], name: str, live: Tensor | None) -> Tensor | None:
    found = _tensor(saved, name)
    return found if _match(found, live) else live


def _tensor(module: Mapping[str, Any], name: str) -> Tensor | None:
    """The tensor of that name, also where it is tied to another."""
    name = module["aliases"].get(name, name)
    found: Tensor | None = module["parameters"].get(name)
    return module["buffers"].get(name) if found is None else found


def _match(saved: Tensor | None, live: Tensor | None) -> bool:
    if saved is None or live is None:  # None: a lazy module's, or a buffer that is not there yet
        return saved is not None
    return (saved.shape, saved.dtype) == (live.shape, live.dtype)


def fitted_optimizer(saved: Tree, live: Tree, model: Mapping[str, Any], was: Mapping[str, Any]) -> Tree:
    """The optimizer of saved model `was`, for the live `model`: the state of what matches, and none of the rest.

    Groups are left as they are where they differ by more than what the models differ in.
    """
    if saved["class"] != live["class"] or len(saved["groups"]) != len(live["groups"]):
        return saved
    kept = kept_parameters(was, model)
    here, there = _names(model), _names(was)
    outside = {
        name: saved["parameters"][name] if _match(saved["parameters"].get(name), tensor) else tensor
        for name, tensor in live["parameters"].items()
    }
    state = {name: entry for name, entry in saved["state"].items() if name in kept or name in outside}
    groups = [
        {**group, "parameters": _fitted_names(group["parameters"], now["parameters"], here, there)}
        for group, now in zip(saved["groups"], live["groups"], strict=True)
    ]
    return {**saved, "groups": groups, "state": state, "parameters": outside}


def _names(module: Mapping[str, Any]) -> set[str]:
    return {*module["parameters"], *module["aliases"]}


def _fitted_names(
    saved: Sequence[str], live: Sequence[str], here: Collection[str], there: Collection[str]
) -> list[str]:
    gone, new = set(there) - set(here), set(here) - set(there)
    fitted = [name for name in saved if name not in gone] + [name for name in live if name in new]
    return list(live) if set(fitted) == set(live) else fitted


def fitted_average(saved: Tree, live: Tree) -> Tree:
    """The state of an average of the weights, with the live one's where the model's tensors do not match."""
    matching = {kind: _matching_all(saved[kind], live[kind]) for kind in ("parameters", "buffers")}
    return {**saved, **matching, "attributes": live["attributes"]}


def _matching_all(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: saved[name] if _match(saved.get(name), tensor) else tensor for name, tensor in live.items()}


# -- another loader, other metrics ---------------------------------------------------------------------


def fitted_data(saved: Tree, live: Tree, *, length: int | None, over: bool, same_sampler: bool) -> Tree:
    """Where the live stream is to stand: at the saved position of the saved epoch, or at its end if that is nearer.

    `length` is the number of batches of its epochs, where it is known; `over`: the saved epoch was complete. The
    order is drawn from the saved random states as far as the live stream has use for them.
    """
    origin = {**live["origin"], **saved["origin"]}
    for key in ("generators", "counters"):
        then, now = saved["origin"].get(key, {}), live["origin"].get(key, {})
        origin[key] = then if same_sampler and (key == "counters" or then.keys() == now.keys()) else now
    position = saved["position"]
    if length is not None and saved["epoch"] is not None:
        position = length if over else min(position, length)
    return {**live, **saved, "origin": origin, "position": position}


def fitted_metrics(saved: Tree, live: Tree, differing: Collection[str]) -> Tree:
    """The saved accumulators and averages, with the live ones of metrics that the checkpoint lacks or that differ."""
    metrics = {
        name: state if name in differing or name not in saved["metrics"] else saved["metrics"][name]
        for name, state in live["metrics"].items()
    }
    return {**saved, "metrics": metrics}


# -- hyper-parameters ----------------------------------------------------------------------------------


def with_new_entries(saved: Tree, live: Tree) -> Tree:
    """The saved optimizer with the settings that only the live one has, those of a newer torch for instance."""
    return _with_groups(saved, live, lambda group, now: {**now, **group})


def with_rates_of(saved: Tree, live: Tree) -> Tree:
    """The saved optimizer at the beginning of the live one's schedule."""

    def begun(group: Tree, now: Tree) -> Tree:
        cycled = _CYCLED if "max_momentum" in group or "max_momentum" in now else ()
        replaced = {"lr", *SCHEDULERS_OWN, *cycled}
        rest = {key: value for key, value in group.items() if key not in SCHEDULERS_OWN}
        return {**rest, **{key: value for key, value in now.items() if key in replaced}}

    fitted = _with_groups(saved, live, begun)
    return {**fitted, "defaults": {**saved["defaults"], **_only(live["defaults"], "lr")}}


def with_setting(
    name: str, saved: Tree, live: Tree, schedules: Mapping[str, Tree], now: Mapping[str, Tree]
) -> tuple[Tree, dict[str, Tree]]:
    """Optimizer and schedulers with the live value of one setting.

    A learning rate under a schedule goes to the place on it that the saved one has: what it would be by now, had
    the training been given the live one from the start. `schedules` and `now` are the captured schedulers of this
    optimizer, saved and live.
    """
    if name == "lr":
        return _with_rate(saved, live, schedules, now)
    fitted = _with_groups(saved, live, lambda group, here: {**group, **_only(here, name)})
    fitted["defaults"] = {**saved["defaults"], **_only(live["defaults"], name)}
    return fitted, {key: _with_own(name, schedule, now[key]) for key, schedule in schedules.items()}


def _with_rate(
    saved: Tree, live: Tree, schedules: Mapping[str, Tree], now: Mapping[str, Tree]
) -> tuple[Tree, dict[str, Tree]]:
    lowest = next((_lowest(schedule["state"]) for schedule in schedules.values()), 0.0)

    def rated(group: Tree, here: Tree) -> Tree:
        own = _only(here, *SCHEDULERS_OWN)
        return {**group, **own, "lr": _on_schedule(group, here, lowest)}

    fitted = _with_groups(saved, live, rated)
    fitted["defaults"] = {**saved["defaults"], **_only(live["defaults"], "lr")}
    rates = [group["settings"]["lr"] for group in fitted["groups"]]
    return fitted, {
        key: {**schedule, "state": _with_bases(schedule["state"], now[key]["state"], rates)}
        for key, schedule in schedules.items()
    }


def _on_schedule(group: Tree, here: Tree, lowest: float) -> Any:
    if "initial_lr" not in group or "initial_lr" not in here:
        return here["lr"]
    before, after = float(group["initial_lr"]), float(here["initial_lr"])
    if before == lowest:  # the schedule was nowhere but at its lowest
        rate = after
    else:
        rate = lowest + (float(group["lr"]) - lowest) * (after - lowest) / (before - lowest)
    return torch.full_like(here["lr"], rate) if isinstance(here["lr"], Tensor) else rate


def _lowest(state: Mapping[str, Any]) -> float:
    """What the schedule at hand goes down to, and does not scale with the learning rate."""
    inner = state.get("_schedulers")
    if inner and "_milestones" in state:
        return _lowest(inner[bisect_right(state["_milestones"], state["last_epoch"])])
    return float(state.get("eta_min", 0.0))


def _with_bases(state: Tree, now: Tree, rates: list[Any]) -> Tree:
    found = {**state, **_only(now, "base_lrs"), "_last_lr": rates}
    if "_schedulers" in state:
        found["_schedulers"] = [
            _with_bases(*both, rates) for both in zip(state["_schedulers"], now["_schedulers"], strict=True)
        ]
    return found


def _with_own(name: str, schedule: Tree, now: Tree) -> Tree:
    return {**schedule, "state": _with_own_state(name, schedule["state"], now["state"])}


def _with_own_state(name: str, state: Tree, now: Tree) -> Tree:
    found = dict(state)
    for key in (name, f"_{name}"):
        if key in state and key in now:
            found |= _only(now, key, _DERIVED.get(key, key))
    if "_schedulers" in state:
        found["_schedulers"] = [
            _with_own_state(name, *both)
            for both in zip(state["_schedulers"], now["_schedulers"], strict=True)
        ]
    return found


def _with_groups(saved: Tree, live: Tree, change: Any) -> Tree:
    groups = [
        {**group, "settings": change(group["settings"], now["settings"])}
        for group, now in zip(saved["groups"], live["groups"], strict=True)
    ]
    return {**saved, "groups": groups}


def _only(tree: Mapping[str, Any], *keys: str) -> Tree:
    return {key: tree[key] for key in keys if key in tree}
