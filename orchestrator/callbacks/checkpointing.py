"""Checkpointing: when to save, and which checkpoints to keep."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.callbacks.base import Callback
from orchestrator.errors import ConfigurationError
from orchestrator.snapshot.info import CheckpointInfo
from states.table import State, Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["BEFORE_THE_END", "Checkpointing", "best_of", "kept"]

BEFORE_THE_END = "before the end"
"""The purpose of the checkpoint that a finished run is extended from."""


class Checkpointing(Callback):
    """Saves by batches, epochs or seconds, whichever comes first, and keeps what is worth keeping.

    A checkpoint of IDLE is made before the first batch, one before the end and one of DONE always.
    `best` names a metric of epochs (such as "val/loss"); an epoch that improves it is saved.

    Args:
        every_batches: save after every so many batches, counted from the beginning of the run.
        every_epochs: save at the end of every so many epochs; None for never.
        every_seconds: save at the first batch's end after so many seconds without a save.
        keep_last: how many of the newest checkpoints stay.
        best: the metric whose best checkpoint stays.
        mode: whether "min" or "max" of `best` is the best.
        keep_every_epochs: the checkpoint at the end of each Kth epoch stays for good.
    """

    def __init__(
        self,
        every_batches: int | None = None,
        every_epochs: int | None = 1,
        every_seconds: float | None = None,
        keep_last: int = 2,
        best: str | None = None,
        mode: str = "min",
        keep_every_epochs: int | None = None,
    ) -> None:
        for name, value in (
            ("every_batches", every_batches),
            ("every_epochs", every_epochs),
            ("every_seconds", every_seconds),
            ("keep_last", keep_last),
            ("keep_every_epochs", keep_every_epochs),
        ):
            if value is not None and value <= 0:
                raise ConfigurationError(f"Checkpointing({name}={value}): expected a positive number or None")
        if mode not in ("min", "max"):
            raise ConfigurationError(f'Checkpointing(mode={mode!r}): expected "min" or "max"')
        self.every_batches = every_batches
        self.every_epochs = every_epochs
        self.every_seconds = every_seconds
        self.keep_last = keep_last
        self.best = best
        self.mode = mode
        self.keep_every_epochs = keep_every_epochs
        self.best_value: float | None = None
        self._last_save = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Hook only what is asked for."""
        super().attach(trainer)
        if self.every_batches or self.every_seconds or trainer.max_batches is not None:
            trainer.after(Trigger.END_BATCH)(self._after_batch)
        trainer.on(State.DONE)(self._save)

    def on_train_begin(self) -> None:
        """Begin to count the seconds."""
        self._last_save = time.monotonic()

    def _save(self, purpose: str = "") -> None:
        self._last_save = time.monotonic()
        self.trainer.save(purpose=purpose)

    def _after_batch(self) -> None:
        trainer = self.trainer
        if trainer.ending:
            # Reached max_batches within an epoch: a longer run would go on from exactly here.
            self._save(BEFORE_THE_END)
        elif (self.every_batches and trainer.batches % self.every_batches == 0) or (
            self.every_seconds and time.monotonic() - self._last_save >= self.every_seconds
        ):
            self._save()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Save where the epoch is due, is the best, or is the last."""
        better = self._improves(metrics)
        if self.trainer.ending:
            self._save(BEFORE_THE_END if self.trainer.epoch_complete else "")
        elif better or self._due(epoch, self.every_epochs) or self._due(epoch, self.keep_every_epochs):
            self._save()

    @staticmethod
    def _due(epoch: int, every: int | None) -> bool:
        return every is not None and (epoch + 1) % every == 0

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        if self.best is None:
            return False
        if self.best not in metrics:
            raise ConfigurationError(
                f"Checkpointing(best={self.best!r}): no such metric at the end of this epoch; there are "
                f"{', '.join(sorted(metrics))}"
            )
        value = metrics[self.best]
        if math.isnan(value):
            return False
        if self.best_value is not None and not _better(value, self.best_value, self.mode):
            return False
        self.best_value = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best, "mode": self.mode, "best_value": self.best_value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best value back, if it is still of the same metric."""
        same = (state["best"], state["mode"]) == (self.best, self.mode)
        self.best_value = state["best_value"] if same else None


def _better(value: float, than: float, mode: str) -> bool:
    return value < than if mode == "min" else value > than


def best_of(checkpoints: Sequence[CheckpointInfo], metric: str | None, mode: str) -> CheckpointInfo | None:
    """The checkpoint of an epoch's end with the best finite `metric`; the earliest of equals."""
    found = None
    for info in sorted(checkpoints, key=lambda info: info.seq):
        value = info.metrics.get(metric, math.nan) if metric and info.state is State.EPOCH_END else math.nan
        if not math.isnan(value) and (found is None or _better(value, found.metrics[metric or ""], mode)):
            found = info
    return found


def kept(checkpoints: Sequence[CheckpointInfo], settings: Checkpointing) -> set[str]:
    """The names of the checkpoints that stay; a pure function of what there is.

    The newest of all always stays, and so does the newest one made before the end.
    """
    by_age = sorted(checkpoints, key=lambda info: info.seq, reverse=True)
    keep = {info.name for info in by_age[:1]}
    keep.update(info.name for info in [i for i in by_age if i.state is not State.DONE][: settings.keep_last])
    keep.update(info.name for info in [i for i in by_age if i.purpose == BEFORE_THE_END][:1])
    best = best_of(by_age, settings.best, settings.mode)
    if best is not None:
        keep.add(best.name)
    if settings.keep_every_epochs:
        keep.update(
            info.name
            for info in by_age
            if info.state is State.EPOCH_END and (info.epoch + 1) % settings.keep_every_epochs == 0
        )
    return keep
