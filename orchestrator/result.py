"""Result: what `fit` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from orchestrator.snapshot.capture import restore_weights
from orchestrator.snapshot.storage import read_checkpoint
from states.errors import InterlockError
from states.table import State

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """How a training ended and where to find what it left."""

    state: State
    """DONE or HALTED."""
    reason: str
    """Why it ended: "finished", or the reason given to stop or halt."""
    history: list[dict[str, float]] = field(repr=False)
    """The metrics of each epoch."""
    run: Path
    """The run's folder."""
    best_checkpoint: Path | None
    """The checkpoint of the best epoch; None without `Checkpointing(best=...)`."""
    last_checkpoint: Path | None
    """The newest checkpoint; None where none was made."""
    mlflow_run_id: str | None
    """The id that MLflow gave the run; None where nothing has been delivered yet, or tracking is off."""

    def load_best(self, model: nn.Module) -> None:
        """Put the weights of the best checkpoint into `model`, in place.

        Raises InterlockError where no checkpoint was kept as the best: pass `Checkpointing(best=...)`.
        """
        self._load(model, self.best_checkpoint, "best", 'pass checkpoint=Checkpointing(best="val/loss")')

    def load_last(self, model: nn.Module) -> None:
        """Put the weights of the newest checkpoint into `model`, in place."""
        self._load(model, self.last_checkpoint, "last", "do not pass checkpoint=None")

    @staticmethod
    def _load(model: nn.Module, path: Path | None, which: str, advice: str) -> None:
        if path is None:
            raise InterlockError(f"this training kept no {which} checkpoint; {advice}")
        _, tree = read_checkpoint(path)
        restore_weights(model, tree["model"])
