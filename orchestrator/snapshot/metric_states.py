"""The state of metrics with torchmetrics' interface in mid-epoch; torchmetrics is not imported."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.snapshot.differences import UnsupportedStateError, refuse
from orchestrator.snapshot.tensors import copied, replicas

__all__ = [
    "capture_metric",
    "capture_states",
    "compare_metric",
    "has_states",
    "restore_metric",
    "restore_states",
]

Tree = dict[str, Any]

# What torchmetrics keeps beside its declared states: counters, the cached result, what wrappers remember.
_BESIDE = ("_update_count", "_computed", "_num_vals_seen", "min_val", "max_val")

# A collection updates one metric of each group and lets the others refer to its states.
_GROUPING = ("_groups", "_groups_checked")

_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
_DATA = (type(None), bool, int, float, complex, str, bytes, Tensor)


def has_states(item: object) -> bool:
    """Whether it declares states as a `torchmetrics.Metric` does, or groups such metrics in a collection."""
    # vars, as asking a module for an attribute that it has not is slow.
    found = getattr(item, "__dict__", {})
    if isinstance(found.get("_defaults"), dict):
        return callable(getattr(item, "update", None)) and callable(getattr(item, "compute", None))
    return "_groups_checked" in found


def capture_states(metric: object) -> Tree:
    """The declared states of one metric (tensors or lists of them; non-persistent too) and its counters."""
    declared = getattr(metric, "_defaults", {})
    kept = [*declared, *(name for name in (*_BESIDE, *_GROUPING) if name in vars(metric))]
    return {name: copied(getattr(metric, name)) for name in kept}


def restore_states(metric: object, states: Mapping[str, Any]) -> None:
    """Give one metric the states that `capture_states` gave, as new tensors.

    Not in place: before its first update a metric may share a tensor with others, or with its own default.
    """
    for name, saved in states.items():
        setattr(metric, name, replicas(saved, _device(metric, getattr(metric, name, None))))
    if states.get("_groups_checked"):
        _share_states(metric)


def _device(metric: object, live: object) -> torch.device:
    if isinstance(live, Tensor):
        return live.device
    found = getattr(metric, "device", None)
    return found if isinstance(found, torch.device) else torch.device("cpu")


def _share_states(collection: Any) -> None:
    """Let the metrics of each group refer to the states of its first again."""
    collection._state_is_copy = False
    collection._compute_groups_create_state_ref()


def capture_metric(metric: object) -> Tree:
    """The state of any metric with `update`, `compute` and `reset`, as references.

    One that declares its states, and every metric inside it: those. One with `state_dict` and
    `load_state_dict`: what they give. Any other: its attributes.

    Raises UnsupportedStateError for one with an attribute whose state cannot be seen.
    """
    parts = dict(_parts(metric))
    if parts:
        return {"states": {path: capture_states(part) for path, part in parts.items()}}
    if _loads(metric):
        return {"state_dict": copied(metric.state_dict())}  # type: ignore[attr-defined]
    return {"attributes": _attributes(metric)}


def _parts(metric: object) -> Iterator[tuple[str, object]]:
    if isinstance(metric, nn.Module):
        yield from ((path, part) for path, part in metric.named_modules() if has_states(part))
    elif has_states(metric):
        yield "", metric


def _loads(metric: object) -> bool:
    # A module's own state_dict has registered tensors only; what a metric adds up is in plain attributes.
    if isinstance(metric, nn.Module) and type(metric).state_dict is nn.Module.state_dict:
        return False
    return callable(getattr(metric, "state_dict", None)) and callable(
        getattr(metric, "load_state_dict", None)
    )


def _attributes(metric: object) -> Tree:
    found = {}
    for name, value in _variables(metric):
        if isinstance(value, _CODE):
            continue
        if not _is_data(value):
            raise UnsupportedStateError(
                f"{type(metric).__name__}.{name} is a {type(value).__name__}, whose state cannot be seen; "
                "expected numbers, tensors, and lists or dicts of them: give the metric state_dict and "
                "load_state_dict"
            )
        found[name] = copied(value)
    return found


def _variables(metric: object) -> Iterator[tuple[str, Any]]:
    inside_module = vars(nn.Module()).keys() if isinstance(metric, nn.Module) else frozenset()
    for name, value in getattr(metric, "__dict__", {}).items():
        if name not in inside_module:
            yield name, value
    if isinstance(metric, nn.Module):
        yield from metric.named_buffers()
    for kind in type(metric).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(metric, name):
                yield name, getattr(metric, name)


def _is_data(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, value.keys())) and all(map(_is_data, value.values()))
    return isinstance(value, _DATA) or type(value).__module__ in ("numpy", "torch")


def compare_metric(metric: object, tree: Mapping[str, Any]) -> list[str]:
    """What of `tree` does not fit `metric`: other metrics or states in it; empty if all does."""
    return list(_differences(metric, dict(_parts(metric)), tree))


def restore_metric(metric: object, tree: Mapping[str, Any]) -> None:
    """Give `metric` the state that `capture_metric` gave.

    Raises IncompatibleStateError, before anything is changed, where other metrics or states are in it.
    """
    parts = dict(_parts(metric))
    refuse(f"the metric {type(metric).__name__}", _differences(metric, parts, tree))
    if "states" in tree:
        for path, states in tree["states"].items():
            restore_states(parts[path], states)
    elif "state_dict" in tree:
        metric.load_state_dict(replicas(tree["state_dict"], _device(metric, None)))  # type: ignore[attr-defined]
    else:
        for name, saved in tree["attributes"].items():
            _set_attribute(metric, name, saved)


def _differences(metric: object, parts: Mapping[str, object], tree: Mapping[str, Any]) -> Iterator[str]:
    kind = "states" if parts else "state_dict" if _loads(metric) else "attributes"
    if kind not in tree:
        yield f"checkpoint has its {', '.join(tree)}, the metric has {kind}"
        return
    if kind == "states":
        for path in sorted(tree["states"].keys() ^ parts.keys()):
            yield f"metric {path!r} is in only one of both"
        for path, states in tree["states"].items():
            declared = getattr(parts.get(path), "_defaults", states)
            for name in sorted(declared.keys() - states.keys()):
                yield f"metric {path!r}: checkpoint has no state {name!r}"
            for name in sorted(states.keys() - declared.keys() - {*_BESIDE, *_GROUPING}):
                yield f"metric {path!r}: the metric has no state {name!r}"


def _set_attribute(metric: object, name: str, saved: Any) -> None:
    owner, _, key = name.rpartition(".")
    target = metric.get_submodule(owner) if owner and isinstance(metric, nn.Module) else metric
    setattr(target, key, replicas(saved, _device(metric, getattr(target, key, None))))
