"""LRScheduling: steps a learning rate scheduler of torch, by epoch, by batch, or on a metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.watched import Watched
from orchestrator.errors import ConfigurationError, kind_of
from orchestrator.snapshot.capture import capture_scheduler, restore_scheduler
from orchestrator.warning import warn
from states.table import Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["LRScheduling"]


class LRScheduling(Callback):
    """Steps any scheduler of `torch.optim.lr_scheduler` after each epoch or after each update.

    Args:
        scheduler: made for an optimizer of the trainer.
        every: "epoch" steps at the end of each epoch, after validation. "batch" steps after each update of the
            scheduler's own optimizer: once for each accumulation window, not after a skipped one, and with several
            phases only after a step of the phase that has this optimizer.
        monitor: the metric that ReduceLROnPlateau decides by (of the epoch, or of the batch).

    Raises ConfigurationError for a ReduceLROnPlateau without `monitor`, a `monitor` that the scheduler has
    no use for, and a scheduler of an optimizer that the trainer does not have.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        every: Literal["epoch", "batch"] = "epoch",
        monitor: str | None = None,
    ) -> None:
        if every not in ("epoch", "batch"):
            raise ConfigurationError(f'every is {every!r}; expected "epoch" or "batch"')
        if not isinstance(getattr(scheduler, "optimizer", None), Optimizer):
            raise ConfigurationError(
                f"LRScheduling, or scheduler=, was given {kind_of(scheduler)}; expected a scheduler object of "
                "torch.optim.lr_scheduler, such as StepLR(optimizer, 10), made for the optimizer of the trainer"
            )
        if monitor is not None and not isinstance(monitor, str):
            raise ConfigurationError(
                f'LRScheduling: monitor is {monitor!r}; expected the name of a metric, such as "val/loss"'
            )
        on_metric = isinstance(scheduler, ReduceLROnPlateau)
        if on_metric and monitor is None:
            raise ConfigurationError(
                'ReduceLROnPlateau decides by a metric: name it, as in LRScheduling(s, monitor="val/loss")'
            )
        if monitor is not None and not on_metric:
            raise ConfigurationError(
                f"{type(scheduler).__name__} takes no metric; leave monitor={monitor!r} out"
            )
        self.scheduler = scheduler
        self.every = every
        self.monitor = monitor
        self._stepped = False
        self._length_checked = False

    @property
    def name(self) -> str:
        """Its key in checkpoints."""
        return f"LRScheduling/{type(self.scheduler).__name__}"

    def attach(self, trainer: Trainer) -> None:
        """Find the scheduler's optimizer and hook its transition."""
        super().attach(trainer)
        optimizer = self.scheduler.optimizer
        self._phases = {phase.name for phase in trainer.phases if phase.optimizer is optimizer}
        if not self._phases:
            raise ConfigurationError(
                f"the {type(self.scheduler).__name__} schedules {kind_of(optimizer)} that this trainer "
                "does not have; make the scheduler for the optimizer that the trainer is given"
            )
        for group in optimizer.param_groups:
            # Every scheduler but ReduceLROnPlateau keeps it: what a resumed run's optimizer was given is told by it.
            group.setdefault("initial_lr", group["lr"])
        if self.every == "batch":
            trainer.after(Trigger.STEP)(self._after_update)
        else:
            trainer.after(Trigger.END_EPOCH)(self._after_epoch)
        if self._span() is not None:
            trainer.after(Trigger.BEGIN_EPOCH)(self._check_length)

    def _span(self) -> tuple[str, int] | None:
        """How many steps the schedule is made for, with the name of the argument that says so, where one does."""
        for name in ("total_steps", "T_max"):
            if isinstance(value := getattr(self.scheduler, name, None), int):
                return name, value
        return None

    def _check_length(self) -> None:
        """Warn, once, of a schedule in the other unit, and of one that is over before the training."""
        span = self._span()
        if self._length_checked or span is None:
            return
        self._length_checked = True
        scheduler, (argument, total) = self.scheduler, span
        steps = {every: scheduler.last_epoch + self._steps_left(every) for every in ("epoch", "batch")}
        needed = steps[self.every]
        other = "batch" if self.every == "epoch" else "epoch"
        if total == steps[other] != needed > 0:
            warn(
                f"{type(scheduler).__name__} has {argument}={total}, but is stepped by {self.every}, {needed} times in "
                f"this training; {total} is how often it would be by {other}: expected "
                f'LRScheduling(scheduler, every="{other}"), or {argument}={needed}'
            )
        elif needed > total and argument == "total_steps":  # OneCycleLR's; others go on
            warn(
                f"{type(scheduler).__name__} has {total} steps, {scheduler.last_epoch} of them done, and the training "
                f"comes to {needed}: the step after the last raises an error. Construct it with total_steps={needed}; "
                "to resume with that, say override={'total_steps'}"
            )

    def _steps_left(self, every: str) -> int:
        """As many as are sure to come, at the beginning of an epoch; 0 where the training has no end that is known."""
        trainer, limits = self.trainer, []
        length, accumulate = trainer.batches_per_epoch, trainer._training.work.accumulate
        if every == "epoch":
            steps_an_epoch, batches_a_step = 1, length
        else:
            steps_an_epoch, batches_a_step = math.ceil((length or 0) / accumulate), accumulate
        if trainer.epochs is not None:
            limits.append((trainer.epochs - trainer.epoch) * steps_an_epoch)
        if trainer.max_batches is not None:
            limits.append((trainer.max_batches - trainer.batches) // batches_a_step if batches_a_step else 0)
        return min(limits, default=0)

    def _after_update(self) -> None:
        if self.trainer.skipped or self.trainer.phase not in self._phases:
            return
        if self.monitor is not None and self.trainer._training.work.situation.empty:
            return  # it closes a window of batches before it, and has measured nothing to decide by
        self._step(self.trainer.metrics)

    def _after_epoch(self) -> None:
        self._step(self.trainer.history[-1])

    def _step(self, metrics: Mapping[str, float]) -> None:
        if self.monitor is not None:
            # torch's mode is in the scheduler; ours is not asked for a comparison.
            value = Watched(self.monitor, "min").read(metrics, self.name)
            self.scheduler.step(value)  # type: ignore[arg-type]
        elif self._stepped:
            self.scheduler.step()
        else:
            # In a process that has resumed, torch has not seen optimizer.step() yet and would warn of a wrong
            # order, which the machine rules out.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()
        self._stepped = True

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""
        return {"scheduler": capture_scheduler(self.scheduler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scheduler where it was; the learning rates themselves are the optimizer's state."""
        restore_scheduler(self.scheduler, state["scheduler"])
