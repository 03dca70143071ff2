"""The state of a model: parameters, buffers, modes, extra state; captured by reference, restored in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.attributes import (
    Built,
    attribute_differences,
    capture_attributes,
    restore_attributes,
)
from orchestrator.snapshot.differences import describe, refuse
from orchestrator.snapshot.metric_states import capture_states, has_states, restore_states
from orchestrator.snapshot.names import (
    Slot,
    aliases,
    buffer_slots,
    parameter_slots,
    slots_of,
    submodules,
    unique_submodules,
    unwrapped,
)
from orchestrator.snapshot.tensors import overwrite, replica, replicas

__all__ = ["capture_module", "compare_module", "restore_module", "restore_weights"]

Tree = dict[str, Any]


def capture_module(module: nn.Module, built: Built | None = None, attributes: Tree | None = None) -> Tree:
    """The state of `module` under plain names; tensors are references to the live ones.

    `built` says how its attributes were before training; `attributes` are what `capture_attributes` gives with it,
    where that was asked already.

    Keys: `parameters`, `buffers` (None, or a parameter of a lazy module that has no shape yet, is None),
    `aliases` (tied name: the name under which the tensor is), `non_persistent` (names of buffers),
    `requires_grad`, and by module: `modes` (train or eval), `types` (class names), `extra` (what
    `get_extra_state` gives), `metrics` (states of torchmetrics objects inside the model); and `attributes`,
    see `capture_attributes`.
    """
    parameters, buffers = slots_of(module)
    tied = aliases([*parameters, *buffers])
    modules = unique_submodules(module)
    return {
        "parameters": {slot.name: _reference(slot) for slot in parameters if slot.name not in tied},
        "buffers": {slot.name: _reference(slot) for slot in buffers if slot.name not in tied},
        "aliases": tied,
        "non_persistent": [s.name for s in buffers if s.key in s.owner._non_persistent_buffers_set],
        "requires_grad": {slot.name: _live(slot).requires_grad for slot in parameters},
        "modes": {path: part.training for path, part in modules.items()},
        "types": {path: _type_name(part) for path, part in modules.items()},
        "extra": {path: part.get_extra_state() for path, part in modules.items() if _has_extra(part)},
        "metrics": {path: capture_states(part) for path, part in modules.items() if has_states(part)},
        "attributes": capture_attributes(module, built) if attributes is None else attributes,
    }


def _reference(slot: Slot) -> Tensor | None:
    tensor = slot.tensor
    return None if tensor is None or is_lazy(tensor) else tensor.detach()


def _live(slot: Slot) -> Tensor:
    assert slot.tensor is not None, slot.name
    return slot.tensor


def _type_name(module: nn.Module) -> str:
    # A lazy module turns into this class when it sees its first batch.
    kind = getattr(type(module), "cls_to_become", None) or type(module)
    return str(kind.__name__)


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def restore_module(module: nn.Module, tree: Mapping[str, Any], built: Built | None = None) -> None:
    """Make `module` what it was when `tree` was captured; live tensors are written in place.

    `built` says how its attributes were before training: those that came later and are not in `tree` go.

    A buffer that cannot be (it was None, or had another shape) is replaced in its module; a parameter with
    other strides gets them and stays the same object.

    Raises IncompatibleStateError, before anything is changed, listing all that `compare_module` finds.
    """
    refuse("the model", compare_module(module, tree))
    _restore_tensors(module, tree)
    for slot in parameter_slots(module):
        if not is_lazy(_live(slot)):
            _live(slot).requires_grad_(tree["requires_grad"][slot.name])
    modules = unique_submodules(module)
    for path, part in modules.items():
        part.training = tree["modes"][path]
    for part in module.modules():
        part.training = unwrapped(part).training
    for path, state in tree["metrics"].items():
        restore_states(modules[path], state)
    if "attributes" in tree:
        restore_attributes(module, tree["attributes"], built)
    for path, state in tree["extra"].items():
        modules[path].set_extra_state(replicas(state))


def restore_weights(module: nn.Module, tree: Mapping[str, Any]) -> None:
    """Put the parameters and buffers of `tree` into `module`, in place; modes and all else stay.

    Raises IncompatibleStateError, before anything is changed, listing names, shapes and dtypes that differ.
    """
    refuse("the model", [*_parameter_differences(module, tree), *_buffer_differences(module, tree)])
    _restore_tensors(module, tree)


def compare_module(module: nn.Module, tree: Mapping[str, Any]) -> list[str]:
    """What of `tree` does not fit `module`: names, shapes, dtypes, types of modules; empty if all does.

    Buffers of a module that is not one of torch.nn may be missing, None, or of another shape: such modules
    make and resize buffers as they go.
    """
    return [
        *_parameter_differences(module, tree),
        *_buffer_differences(module, tree),
        *_module_differences(module, tree),
        *(attribute_differences(module, tree["attributes"]) if "attributes" in tree else ()),
    ]


def _parameter_differences(module: nn.Module, tree: Mapping[str, Any]) -> Iterator[str]:
    slots = {slot.name: slot for slot in parameter_slots(module)}
    tied = aliases(list(slots.values()))
    saved: dict[str, Any] = tree["parameters"]
    saved_ties = {name: of for name, of in tree["aliases"].items() if name in tree["requires_grad"]}
    for name in [*slots, *(n for n in (*saved, *saved_ties) if n not in slots)]:
        if name not in slots:
            there = _described(saved, name, saved_ties)
            yield f"parameter {name!r}: checkpoint has {there}, the model has none"
        elif name not in saved and name not in saved_ties:
            yield f"parameter {name!r}: checkpoint has none, the model has {_seen(_live(slots[name]))}"
        elif tied.get(name) != saved_ties.get(name):
            yield (
                f"parameter {name!r}: checkpoint has {_described(saved, name, saved_ties)}, "
                f"the model has {_described({name: _live(slots[name])}, name, tied)}"
            )
        elif name in saved:
            yield from _tensor_differences("parameter", name, saved[name], _live(slots[name]))


def _described(tensors: Mapping[str, Tensor | None], name: str, tied: Mapping[str, str]) -> str:
    if name in tied:
        return f"it tied to {tied[name]!r}"
    return _seen(tensors[name]) + " of its own" if tied else _seen(tensors[name])


def _seen(tensor: Tensor | None) -> str:
    return "one without a shape yet" if tensor is None or is_lazy(tensor) else describe(tensor)


def _tensor_differences(kind: str, name: str, saved: Tensor | None, live: Tensor) -> Iterator[str]:
    if is_lazy(live):
        return
    if saved is None or (saved.shape, saved.dtype) != (live.shape, live.dtype):
        yield f"{kind} {name!r}: checkpoint has {_seen(saved)}, the model has {_seen(live)}"


def _buffer_differences(module: nn.Module, tree: Mapping[str, Any]) -> Iterator[str]:
    slots = {slot.name: slot for slot in buffer_slots(module)}
    owners = dict(submodules(module))
    saved: dict[str, Any] = tree["buffers"]
    for name in [*slots, *(n for n in saved if n not in slots)]:
        owner = owners.get(name.rpartition(".")[0])
        if name not in slots:
            if owner is None or not _makes_buffers(owner):
                yield f"buffer {name!r}: checkpoint has {_buffer_seen(saved[name])}, the model has none"
            continue
        if name not in saved:
            if name not in tree["aliases"] and not _makes_buffers(slots[name].owner):
                here = _buffer_seen(slots[name].tensor)
                yield f"buffer {name!r}: checkpoint has none, the model has {here}"
            continue
        yield from _registered_difference(slots[name], saved[name])


def _registered_difference(slot: Slot, saved: Tensor | None) -> Iterator[str]:
    live = slot.tensor
    if saved is not None and live is not None and _makes_buffers(slot.owner):
        differs = saved.dtype != live.dtype and not is_lazy(live)
    elif _makes_buffers(slot.owner) or (live is not None and is_lazy(live)):
        differs = False
    elif saved is None or live is None:
        differs = saved is not live
    else:
        differs = (saved.shape, saved.dtype) != (live.shape, live.dtype)
    if differs:
        there, here = _buffer_seen(saved), _buffer_seen(live)
        yield f"buffer {slot.name!r}: checkpoint has {there}, the model has {here}"


def _buffer_seen(tensor: Tensor | None) -> str:
    return "None" if tensor is None else _seen(tensor)


def _makes_buffers(module: nn.Module) -> bool:
    """Whether it may make or resize buffers while training; the modules of torch.nn do not."""
    return not type(module).__module__.startswith("torch.nn.modules.")


def _module_differences(module: nn.Module, tree: Mapping[str, Any]) -> Iterator[str]:
    parts = unique_submodules(module)
    live = {path: _type_name(part) for path, part in parts.items()}
    saved: dict[str, str] = tree["types"]
    for path in [*live, *(p for p in saved if p not in live)]:
        found, expected = live.get(path), saved.get(path)
        if found != expected:
            name = f"module {path!r}" if path else "the model itself"
            yield f"{name}: checkpoint has {expected or 'none'}, the model has {found or 'none'}"
    for path in sorted(tree["metrics"].keys() - {p for p in parts if has_states(parts[p])}):
        if path in live:
            yield f"module {path!r}: checkpoint has the states of a metric, the model has none"
    for path in sorted(tree["extra"].keys() - {p for p in parts if _has_extra(parts[p])}):
        if path in live:
            yield f"module {path!r}: checkpoint has extra state, the model has no set_extra_state for it"


def _restore_tensors(module: nn.Module, tree: Mapping[str, Any]) -> None:
    slots = {slot.name: slot for slot in chain(*slots_of(module))}
    tied = aliases(list(slots.values()))
    for name, saved in tree["parameters"].items():
        if saved is not None:
            _write_parameter(_live(slots[name]), saved)
    for name, saved in tree["buffers"].items():
        # Memory that is shared now and was not then must not be written through two names.
        _write_buffer(module, slots.get(name), name, saved, tree, in_place=name not in tied)
    slots = {slot.name: slot for slot in chain(*slots_of(module))}
    for name, canonical in tree["aliases"].items():
        _tie(module, name, slots.get(name), _live(slots[canonical]), tree)
    for name, slot in slots.items():
        if slot.kind == "buffer" and name not in tree["buffers"] and name not in tree["aliases"]:
            _forget(slot)


def _write_parameter(live: Tensor, saved: Tensor) -> None:
    if isinstance(live, nn.UninitializedParameter):
        live.materialize(saved.shape, dtype=saved.dtype)
    if not overwrite(live, saved):
        live.data = replica(saved, live.device)  # the object stays, so optimizers and hooks still hold it


def _write_buffer(
    root: nn.Module,
    slot: Slot | None,
    name: str,
    saved: Tensor | None,
    tree: Mapping[str, Any],
    *,
    in_place: bool,
) -> None:
    live = None if slot is None else slot.tensor
    if saved is None and live is not None and is_lazy(live):
        return
    if live is not None and saved is not None and in_place:
        if isinstance(live, nn.UninitializedBuffer):
            live.materialize(saved.shape, dtype=saved.dtype)
        if overwrite(live, saved):
            return
    path, _, key = name.rpartition(".")
    owner = dict(submodules(root))[path] if slot is None else slot.owner
    device = live.device if live is not None else _home(owner, root)
    made = None if saved is None else replica(saved, device)
    owner.register_buffer(key, made, persistent=name not in tree["non_persistent"])


def _home(owner: nn.Module, root: nn.Module) -> torch.device:
    """Where a buffer that a module has not made yet will be wanted."""
    for module in (owner, root):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _tie(root: nn.Module, name: str, slot: Slot | None, canonical: Tensor, tree: Mapping[str, Any]) -> None:
    live = None if slot is None else slot.tensor
    if slot is not None and slot.kind == "parameter":
        assert live is not None, name
        if live is not canonical and live.data_ptr() != canonical.data_ptr():
            live.data = canonical.data
    elif live is not canonical and (live is None or live.data_ptr() != canonical.data_ptr()):
        path, _, key = name.rpartition(".")
        owner = dict(submodules(root))[path] if slot is None else slot.owner
        shared = canonical.detach() if isinstance(canonical, nn.Parameter) else canonical
        owner.register_buffer(key, shared, persistent=name not in tree["non_persistent"])


def _forget(slot: Slot) -> None:
    """Remove a buffer that the module had not made yet."""
    del slot.owner._buffers[slot.key]
    slot.owner._non_persistent_buffers_set.discard(slot.key)
