"""Phase: one forward, backward and step of a batch that has several (a GAN's two players)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["Forward", "Phase"]

Forward = Callable[[nn.Module, Any], Any]
"""`(model, batch) -> loss` or `-> (loss, outputs, targets)`; loss is a scalar floating-point tensor."""


@dataclass(frozen=True)
class Phase:
    """One pass through FORWARD, BACKWARD and STEP within a batch.

    The journal names the phase of each transition.
    """

    name: str
    """How the journal and `seek(phase=...)` call it."""
    optimizer: Optimizer
    """Zeroes and updates its own parameters only."""
    forward: Forward
    """`forward(model, batch)` returns a scalar loss, or `(loss, outputs, targets)` where metrics are computed from
    outputs and targets."""
