"""Gradients, wanted where an accumulation window is open: None is not zero, strides and sparsity are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrator.snapshot.differences import refuse
from orchestrator.snapshot.names import parameter_names
from orchestrator.snapshot.optimizers import outside_parameters
from orchestrator.snapshot.tensors import overwrite, replica

__all__ = ["capture_gradients", "restore_gradients"]

Tree = dict[str, Any]


def capture_gradients(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Tree:
    """The gradient, or None, of each parameter of `module`, and of what `optimizers` hold beside them.

    `{"model": {name: gradient}, "optimizers": [{name: gradient}, ...]}`; tensors are references.
    """
    return {
        "model": {name: _gradient(p) for p, name in parameter_names(module).items()},
        "optimizers": [
            {name: _gradient(p) for name, p in outside.items()} for outside in _outside(module, optimizers)
        ],
    }


def _gradient(parameter: Tensor) -> Tensor | None:
    return None if parameter.grad is None else parameter.grad.detach()


def _outside(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[dict[str, Tensor]]:
    names = parameter_names(module)
    return [outside_parameters(optimizer, names) for optimizer in optimizers]


def restore_gradients(
    module: nn.Module, tree: Mapping[str, Any], optimizers: Iterable[Optimizer] = ()
) -> None:
    """Put the gradients back, in place where one of the same shape and strides is there.

    Raises IncompatibleStateError, before anything is changed, where parameters differ.
    """
    live = [{name: p for p, name in parameter_names(module).items()}, *_outside(module, optimizers)]
    saved = [tree["model"], *tree["optimizers"]]
    differing = [n for a, b in zip(live, saved, strict=False) for n in sorted(a.keys() ^ b.keys())]
    if len(live) != len(saved):
        differing.append(f"{len(saved) - 1} optimizers, not {len(live) - 1}")
    refuse("the model's gradients", [f"only one of both has {name}" for name in differing])
    for parameters, gradients in zip(live, saved, strict=True):
        for name, parameter in parameters.items():
            _set_gradient(parameter, gradients[name])


def _set_gradient(parameter: Tensor, saved: Tensor | None) -> None:
    if saved is None:
        parameter.grad = None
    elif parameter.grad is None or not overwrite(parameter.grad, saved):
        parameter.grad = replica(saved, parameter.device)
