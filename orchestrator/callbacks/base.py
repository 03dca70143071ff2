"""Callback: what a user's class overrides to ride on the transitions of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["Callback", "overrides"]


class Callback:
    """Base of all callbacks. Override what you need; a hook that is not overridden costs nothing.

    `trainer` is set before the first hook is called. Hooks only *request*: `self.trainer.save()`,
    `stop(reason)` and `halt(reason)` are carried out once every hook of the transition has run.
    """

    trainer: Trainer

    @property
    def name(self) -> str:
        """The key of this callback's state in checkpoints. Two callbacks of one class are numbered."""
        return type(self).__name__

    def attach(self, trainer: Trainer) -> None:
        """Called once, when the trainer is built. Add hooks on other transitions here.

        For example `trainer.after(Trigger.BACKWARD)(self.look)`. Call `super().attach(trainer)` first.
        """
        self.trainer = trainer

    def on_train_begin(self) -> None:
        """Called once an attempt, before its first transition; `self.trainer.attempt` tells which.

        In a resumed attempt this comes before the checkpoint is restored, so what a callback resets
        here is replaced by what it had in the checkpoint.
        """

    def on_epoch_begin(self, epoch: int) -> None:
        """Called after `begin_epoch`; epochs count from 0."""

    def on_batch_begin(self, batch: int) -> None:
        """Called after `fetch`, with the index within the epoch; the data is `self.trainer.data`."""

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        """Called after `end_batch`, with the values of this batch."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Called after `end_epoch`, with the values of the epoch, validation included."""

    def on_train_end(self, metrics: Mapping[str, float]) -> None:
        """Called on DONE, with the values of the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain values and tensors, nothing else."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; called while a checkpoint is restored."""


def overrides(callback: Callback, hook: str) -> bool:
    """Whether `callback` has a `hook` of its own."""
    return getattr(type(callback), hook) is not getattr(Callback, hook) or hook in vars(callback)
