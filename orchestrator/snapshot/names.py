"""Plain names: those of the underlying model, whatever torch.compile or DDP wrap around it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.tensor_entries import identity

__all__ = [
    "Slot",
    "aliases",
    "buffer_slots",
    "parameter_names",
    "parameter_slots",
    "registered",
    "slots_of",
    "submodules",
    "unique_submodules",
    "unwrapped",
]

# What these hold is the wrapped module and nothing else; the names are torch's own.
_WRAPPED_AS = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside any number of wrappers (torch.compile, DDP, activation checkpointing)."""
    while True:
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def _inside(module: nn.Module) -> nn.Module | None:
    if not module._modules:
        return None
    if isinstance(module, DistributedDataParallel | DataParallel):
        return cast(nn.Module, module.module)
    for key in _WRAPPED_AS:
        inner = module._modules.get(key)
        if inner is not None:
            return inner
    return None


def submodules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by every path that leads to it, in torch's order; the root's path is ''."""
    found: list[tuple[str, nn.Module]] = []
    _add_submodules("", root, set(), found)
    return iter(found)


def _add_submodules(
    path: str, module: nn.Module, above: set[int], found: list[tuple[str, nn.Module]]
) -> None:
    module = unwrapped(module)
    if id(module) in above:
        return
    found.append((path, module))
    above.add(id(module))
    for key, child in module._modules.items():
        if child is not None:
            below = f"{path}.{key}" if path else key
            if child._modules:
                _add_submodules(below, child, above, found)
            else:  # it wraps nothing either
                found.append((below, child))
    above.remove(id(module))


def unique_submodules(root: nn.Module) -> dict[str, nn.Module]:
    """Each module once, by the first of its paths."""
    first: dict[int, str] = {}
    found = {}
    for path, module in submodules(root):
        if first.setdefault(id(module), path) == path:
            found[path] = module
    return found


def registered(root: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of each module; a tied one as often as it is registered."""
    for module in unique_submodules(root).values():
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                yield tensor


class Slot(NamedTuple):
    """The place in a module where a parameter or buffer is registered."""

    name: str
    owner: nn.Module
    key: str
    kind: Literal["parameter", "buffer"]

    @property
    def tensor(self) -> Tensor | None:
        """What is registered there now."""
        registered = self.owner._parameters if self.kind == "parameter" else self.owner._buffers
        return registered[self.key]


def slots_of(root: nn.Module) -> tuple[list[Slot], list[Slot]]:
    """Where parameters and where buffers are registered, by every path.

    Parameters that are registered as None are left out; such buffers are not, nor are non-persistent ones.
    """
    parameters: list[Slot] = []
    buffers: list[Slot] = []
    for path, module in submodules(root):
        above = path and f"{path}."
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters.append(Slot(above + key, module, key, "parameter"))
        for key in module._buffers:
            buffers.append(Slot(above + key, module, key, "buffer"))
    return parameters, buffers


def parameter_slots(root: nn.Module) -> list[Slot]:
    """The first of `slots_of`."""
    return slots_of(root)[0]


def buffer_slots(root: nn.Module) -> list[Slot]:
    """The second of `slots_of`."""
    return slots_of(root)[1]


def aliases(slots: list[Slot]) -> dict[str, str]:
    """For each name whose tensor (object or memory) an earlier name has already: that earlier name."""
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for slot in slots:
        tensor = slot.tensor
        if tensor is not None:
            name = first.setdefault(_memory(tensor), slot.name)
            if name != slot.name:
                found[slot.name] = name
    return found


def _memory(tensor: Tensor) -> object:
    return id(tensor) if is_lazy(tensor) or tensor.layout is not torch.strided else identity(tensor)


def parameter_names(module: nn.Module) -> dict[Tensor, str]:
    """The plain name of each parameter of `module`; a tied one has the first of its names."""
    names: dict[Tensor, str] = {}
    for slot in parameter_slots(module):
        tensor = slot.tensor
        if tensor is not None:
            names.setdefault(tensor, slot.name)
    return names
