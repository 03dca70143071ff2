"""EarlyStopping: ends a training whose watched metric has stopped improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from orchestrator.callbacks.watched import Direction, Watched, direction_of
from orchestrator.errors import ConfigurationError

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """Asks the trainer to stop after `patience` epochs in a row without an improvement.

    The training goes by its last epoch to DONE; the best weights are Checkpointing's business. `best`,
    `best_epoch` (-1 while there is none) and `waited` (epochs since) are kept in checkpoints.

    Args:
        monitor: a metric of the epoch.
        patience: epochs.
        min_delta: an epoch improves on the best value so far if it is better by more than this; NaN never is.
        mode: "min" or "max"; left out, the name of the metric decides ("val/loss": smaller is better,
            "val/accuracy": greater), and one that does not say it is an error.

    Raises ConfigurationError for arguments that make no sense, MissingMetricError at the end of an epoch
    that has no such metric.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Direction | None = None,
    ) -> None:
        check_whole("EarlyStopping: patience", patience, unit="epoch")
        if (
            isinstance(min_delta, bool)
            or not isinstance(min_delta, int | float)
            or not 0 <= min_delta < math.inf
        ):
            raise ConfigurationError(
                f"EarlyStopping: min_delta is {min_delta!r}; expected a number of 0 or more, whatever the mode"
            )
        self.watched = Watched(monitor, direction_of(monitor, mode))
        self.patience = patience
        self.min_delta = float(min_delta)
        self.best = self.watched.worst
        self.best_epoch = -1
        self.waited = 0

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Compare the epoch with the best one; ask to stop when patience is at its end."""
        value = self.watched.read(metrics, self.name)
        if self.watched.improved(value, self.best, self.min_delta):
            self.best, self.best_epoch, self.waited = value, epoch, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.trainer.stop(self._reason())

    def _reason(self) -> str:
        epochs = "epoch" if self.waited == 1 else f"{self.waited} epochs"
        if self.best_epoch < 0:
            return f"{self.watched.name} was never finite, in {epochs}"
        return f"{self.watched.name} has not improved on {self.best:.6g} in the last {epochs}"

    def state_dict(self) -> dict[str, Any]:
        """The best value, its epoch, and how long ago that was."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]
