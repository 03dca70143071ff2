"""Batch values become epoch values: weighted averages, and metrics that accumulate by themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from orchestrator.errors import ConfigurationError, kind_of
from orchestrator.snapshot.capture import capture_metric, restore_metric

__all__ = ["RESERVED", "AccumulatingMetric", "Average", "EpochMetrics", "Metric", "as_float", "check_scalar"]

RESERVED = frozenset({"loss", "batch_time", "duration", "lr", "grad_norm", "skipped"})
"""Names that interlock gives to values of its own."""


@runtime_checkable
class AccumulatingMetric(Protocol):
    """The interface of `torchmetrics.Metric`, by shape: torchmetrics itself is never imported."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take one batch of outputs and targets in."""

    def compute(self) -> Any:
        """The value over all batches since the last reset; a scalar."""

    def reset(self) -> None:
        """Forget all batches."""


Metric = AccumulatingMetric | Callable[[Any, Any], Any]
"""A torchmetrics object, or `(outputs, targets) -> scalar`, averaged weighted by batch size."""


def as_float(value: Any, name: str) -> float:
    """A Python float from a number or a tensor of one element; waits for the device.

    Raises ConfigurationError for anything else.
    """
    if isinstance(value, torch.Tensor):
        check_scalar(value, name)
        return float(value.detach())
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"metric {name!r} is {kind_of(value)}; expected a number or a tensor of one element"
        ) from None


def check_scalar(value: torch.Tensor, name: str) -> None:
    """Raise ConfigurationError unless `value` has one element."""
    if value.numel() != 1:
        raise ConfigurationError(
            f"metric {name!r} is a tensor of shape {tuple(value.shape)}; expected a scalar: "
            "reduce it, for instance with .mean()"
        )


class Average:
    """A weighted mean in double precision."""

    __slots__ = ("total", "weight")

    def __init__(self) -> None:
        self.total = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float:
        """The mean of what was added; NaN if nothing was."""
        return self.total / self.weight if self.weight else math.nan


class EpochMetrics:
    """The metrics of one scope (training, or one validation loader) over one epoch or pass."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        # Each scope accumulates apart, so each has copies of its own.
        self._accumulating = {
            name: copy.deepcopy(m) for name, m in metrics.items() if isinstance(m, AccumulatingMetric)
        }
        self._functions = {
            name: m for name, m in metrics.items() if not isinstance(m, AccumulatingMetric) and callable(m)
        }
        self._not_averaged = {*self._accumulating, "batch_time"}
        self._averages: dict[str, Average] = {}
        self.samples = 0

    @property
    def wants_outputs(self) -> bool:
        """Whether any metric is computed from outputs and targets."""
        return bool(self._accumulating or self._functions)

    @property
    def accumulating(self) -> Mapping[str, AccumulatingMetric]:
        """The metrics that accumulate by themselves, which are part of a checkpoint."""
        return self._accumulating

    @property
    def names(self) -> frozenset[str]:
        """The names of the metrics that are computed from outputs and targets."""
        return frozenset({*self._accumulating, *self._functions})

    def to(self, device: torch.device) -> None:
        """Move metrics that have tensors of their own to `device`."""
        for metric in self._accumulating.values():
            move = getattr(metric, "to", None)
            if move is not None:
                move(device)

    def reset(self) -> None:
        """Forget everything; the next batch is the first."""
        self._averages.clear()
        self.samples = 0
        for metric in self._accumulating.values():
            metric.reset()

    def observe(self, outputs: Any, targets: Any) -> dict[str, Any]:
        """What each named metric gives for one batch, scalars; accumulating ones also take the batch in."""
        values = {name: f(outputs, targets) for name, f in self._functions.items()}
        for name, metric in self._accumulating.items():
            if callable(metric):  # torchmetrics: calling accumulates and returns the batch's value
                values[name] = metric(outputs, targets)
            else:
                metric.update(outputs, targets)
        return values

    def add(self, values: Mapping[str, float], samples: int, without: Collection[str] = ()) -> None:
        """Fold the values of one batch of `samples` samples, those named in `without` left out, into the averages."""
        self.samples += samples
        if without:
            values = {name: value for name, value in values.items() if name not in without}
        averages = self._averages
        for name, value in values.items():
            if name in averages:
                average = averages[name]
            elif name in self._not_averaged:
                continue
            else:
                average = averages[name] = Average()
            average.total += value * samples
            average.weight += samples

    def values(self) -> dict[str, float]:
        """The values over all batches since `reset`."""
        values = {name: average.value for name, average in self._averages.items()}
        if self.samples:
            for name, metric in self._accumulating.items():
                values[name] = as_float(metric.compute(), name)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Averages and accumulated metrics, for a checkpoint in mid-epoch."""
        return {
            "samples": self.samples,
            "averages": {n: (a.total, a.weight) for n, a in self._averages.items()},
            "metrics": {name: capture_metric(metric) for name, metric in self._accumulating.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.samples = state["samples"]
        self._averages.clear()
        for name, (total, weight) in state["averages"].items():
            average = self._averages[name] = Average()
            average.total, average.weight = total, weight
        for name, metric in self._accumulating.items():
            restore_metric(metric, state["metrics"][name])
