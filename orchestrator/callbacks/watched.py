"""Watched: one metric of an epoch that a callback decides by, and which way of it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import ConfigurationError

__all__ = ["Direction", "MissingMetricError", "Watched", "direction_of"]

Direction = Literal["min", "max"]
"""Whether smaller ("min") or greater ("max") values are better."""

_SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mse", "mae", "rmse")
_GREATER_IS_BETTER = ("accuracy", "acc", "precision", "recall", "f1", "auc", "auroc", "iou", "bleu", "r2")


class MissingMetricError(ConfigurationError):
    """A metric that a callback decides by is not among those of the epoch (or batch)."""


def direction_of(metric: str, mode: Direction | None) -> Direction:
    """`mode` if it is given, otherwise what the last word of the metric's name says.

    Raises ConfigurationError where the name does not say it, for a mode that is neither, and for a metric
    that is no name.
    """
    if not isinstance(metric, str) or not metric:
        raise ConfigurationError(
            f'the metric to watch is {metric!r}; expected the name of a metric of epochs, such as "val/loss"'
        )
    if mode is not None:
        if mode not in ("min", "max"):
            raise ConfigurationError(f'mode is {mode!r}; expected "min" or "max"')
        return mode
    words = metric.lower().replace("/", " ").replace("_", " ").replace("-", " ").split()
    for word in reversed(words):
        if word in _SMALLER_IS_BETTER:
            return "min"
        if word in _GREATER_IS_BETTER:
            return "max"
    raise ConfigurationError(
        f'the name {metric!r} does not say whether smaller or greater is better; pass mode="min" or mode="max"'
    )


@dataclass(frozen=True)
class Watched:
    """The metric `name`, of which smaller or greater values are better."""

    name: str
    mode: Direction

    @property
    def worst(self) -> float:
        """What every finite value is better than."""
        return math.inf if self.mode == "min" else -math.inf

    def read(self, metrics: Mapping[str, float], reader: str) -> float:
        """Its value among `metrics`, on behalf of the callback `reader`.

        Raises MissingMetricError, naming the metrics there are.
        """
        if self.name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise MissingMetricError(
                f"{reader} watches {self.name!r}, which is not among the metrics: {known}. "
                "Watch one of these, or add it by metrics=, val_loader= or trainer.log"
            )
        return float(metrics[self.name])

    def improved(self, value: float, best: float, min_delta: float = 0.0) -> bool:
        """Whether `value` is better than `best` by more than `min_delta`; NaN never is."""
        return value < best - min_delta if self.mode == "min" else value > best + min_delta
