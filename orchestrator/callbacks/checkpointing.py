"""Checkpointing: when to save, and which checkpoints to keep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_positive, check_whole
from orchestrator.callbacks.watched import Direction, Watched, direction_of
from orchestrator.snapshot.info import BEFORE_THE_END, CheckpointInfo
from states.table import State, Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["Checkpointing", "best_of", "kept"]


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
        mode: whether "min" or "max" of `best` is the best; by default what its name says: "loss" is smaller,
            "accuracy" is greater.
        keep_every_epochs: the checkpoint at the end of each Kth epoch stays for good.
    """

    def __init__(
        self,
        every_batches: int | None = None,
        every_epochs: int | None = 1,
        every_seconds: float | None = None,
        keep_last: int = 2,
        best: str | None = None,
        mode: Direction | None = None,
        keep_every_epochs: int | None = None,
    ) -> None:
        for name, value in (
            ("every_batches", every_batches),
            ("every_epochs", every_epochs),
            ("keep_last", keep_last),
            ("keep_every_epochs", keep_every_epochs),
        ):
            check_whole(f"Checkpointing: {name}", value, optional=True)
        check_positive("Checkpointing: every_seconds", every_seconds, optional=True)
        self.every_batches = every_batches
        self.every_epochs = every_epochs
        self.every_seconds = every_seconds
        self.keep_last = keep_last
        self.best = Watched(best, direction_of(best, mode)) if best is not None else None
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

    def _save(self) -> None:
        self._last_save = time.monotonic()
        self.trainer.save()

    def _after_batch(self) -> None:
        trainer = self.trainer
        # Where max_batches is reached within an epoch, a longer run would go on from exactly here.
        if (
            trainer.ending
            or (self.every_batches and trainer.batches % self.every_batches == 0)
            or (self.every_seconds and time.monotonic() - self._last_save >= self.every_seconds)
        ):
            self._save()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Save where the epoch is due, is the best, or is the last."""
        better = self._improves(metrics)
        due = self._due(epoch, self.every_epochs) or self._due(epoch, self.keep_every_epochs)
        if better or due or self.trainer.ending:
            self._save()

    @staticmethod
    def _due(epoch: int, every: int | None) -> bool:
        return every is not None and (epoch + 1) % every == 0

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        if self.best is None:
            return False
        value = self.best.read(metrics, type(self).__name__)
        best = self.best.worst if self.best_value is None else self.best_value
        if not self.best.improved(value, best):
            return False
        self.best_value = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and of what."""
        return {
            "best": None if self.best is None else (self.best.name, self.best.mode),
            "value": self.best_value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best value back, if it is still of the same metric."""
        same = self.best is not None and state["best"] == (self.best.name, self.best.mode)
        self.best_value = state["value"] if same else None


def best_of(checkpoints: Sequence[CheckpointInfo], watched: Watched | None) -> CheckpointInfo | None:
    """The checkpoint of an epoch's end with the best value of the metric; the earliest of equals, never a NaN."""
    found, best = None, watched.worst if watched is not None else 0.0
    for info in sorted(checkpoints, key=lambda info: info.seq):
        if watched is None or info.state is not State.EPOCH_END or watched.name not in info.metrics:
            continue
        if watched.improved(info.metrics[watched.name], best):
            found, best = info, info.metrics[watched.name]
    return found


def kept(checkpoints: Sequence[CheckpointInfo], settings: Checkpointing) -> set[str]:
    """The names of the checkpoints that stay; a pure function of what there is.

    The newest of all always stays, and so does the newest one made before the end.
    """
    by_age = sorted(checkpoints, key=lambda info: info.seq, reverse=True)
    keep = {info.name for info in by_age[:1]}
    keep.update(info.name for info in [i for i in by_age if i.state is not State.DONE][: settings.keep_last])
    keep.update(info.name for info in [i for i in by_age if i.purpose == BEFORE_THE_END][:1])
    best = best_of(by_age, settings.best)
    if best is not None:
        keep.add(best.name)
    if settings.keep_every_epochs:
        keep.update(
            info.name
            for info in by_age
            if info.state is State.EPOCH_END and (info.epoch + 1) % settings.keep_every_epochs == 0
        )
    return keep
