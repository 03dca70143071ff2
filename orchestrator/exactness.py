"""Exactness: what, as things are set up here, may keep a training from being repeated bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["risks"]


def risks(model: nn.Module, device: torch.device) -> list[str]:
    """What is known before a training to make it one that cannot be repeated, each with what to do about it.

    Said when an attempt begins; whether it happens is found out by comparing losses.
    """
    found = [
        f"{what} is compiled with dynamic shapes on demand, so what is computed depends on the shapes seen before, "
        "and a resumed run may differ in the last bits; torch.compile(..., dynamic=False) makes it exact"
        for what in _compiled_on_demand(model)
    ]
    if device.type != "cuda":
        return found
    if torch.backends.cudnn.benchmark:
        found.append(
            "torch.backends.cudnn.benchmark is on, which chooses kernels by timing them, so a resumed run may differ "
            "in the last bits; set it to False, or pass deterministic=True"
        )
    if not torch.are_deterministic_algorithms_enabled():
        found.append(
            "some CUDA kernels add in an order that is chance, so a resumed run may differ in the last bits; "
            "deterministic=True uses kernels that do not, or says which has none"
        )
    return found


def _compiled_on_demand(model: nn.Module) -> list[str]:
    """The modules that torch.compile may compile again, with dynamic shapes, once it has seen other sizes."""
    return [
        f"module {name!r}" if name else "the model"
        for name, module in model.named_modules()
        if (context := _context(module)) is not None and getattr(context, "_dynamic", False) is None
    ]


def _context(module: nn.Module) -> Any:
    """What torch.compile keeps of its arguments: on the wrapper, or in the call that `module.compile()` replaced."""
    if "dynamo_ctx" in vars(module):
        return vars(module)["dynamo_ctx"]
    call = vars(module).get("_compiled_call_impl")
    for cell in getattr(call, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "_dynamic"):
            return cell.cell_contents
    return None
