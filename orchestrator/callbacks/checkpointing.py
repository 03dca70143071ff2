"""Checkpointing: when to save, and which checkpoints to keep."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_positive, check_whole
from orchestrator.callbacks.rhythm import Measured, Rhythm
from orchestrator.callbacks.watched import Direction, Watched, direction_of
from orchestrator.errors import ConfigurationError
from orchestrator.named import named
from orchestrator.snapshot.info import BEFORE_THE_END, BRANCH, CheckpointInfo
from states.table import State, Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["Checkpointing", "best_of", "kept"]

BY_DEFAULT: Any = type("ByDefault", (), {"__repr__": lambda self: "1, or None with overhead"})()


class Checkpointing(Callback):
    """Saves by batches, epochs or seconds, whichever comes first, or by what saving costs; keeps what is worth keeping.

    A checkpoint of IDLE is made before the first batch, one before the end and one of DONE always.
    `best` names a metric of epochs (such as "val/loss"); an epoch that improves it is saved.
    With `at`, batches (or epochs) that are due are saved in those states instead of at their end:
    `Checkpointing(every_batches=100, at=State.BACKWARD)`. Saving in FORWARD costs a copy of the buffers and random
    states before that forward pass, on the batches that are due only.

    Args:
        every_batches: save after every so many batches, counted from the beginning of the run.
        every_epochs: save at the end of every so many epochs; None for never. By default 1; None with `overhead`.
        every_seconds: save at the first batch's end after so many seconds without a save.
        keep_last: how many of the newest checkpoints stay.
        best: the metric whose best checkpoint stays.
        mode: whether "min" or "max" of `best` is the best; by default what its name says: "loss" is smaller,
            "accuracy" is greater.
        keep_every_epochs: the checkpoint at the end of each Kth epoch stays for good.
        keep_first: whether the checkpoint of IDLE stays, so that `seek` can reach every moment of the run.
        at: a state, or several, to save in: those of a batch go with `every_batches`, `every_seconds` and `overhead`,
            those of an epoch with `every_epochs`; HALTED is saved whenever the training halts.
        durable: "remote": remove nothing here before it is safe at the tracking server, where it is uploaded anyway
            (`MLflow(upload=...)`). Nothing waits for the server; what it has not got yet stays, as long as the disk
            has room for three more. "local": what is not kept is removed at once.
        overhead: the share of the training's time that saving may cost, such as 0.03. What a save and a batch cost is
            measured, and batches are saved as often as that allows, but no more than one a second (in an attempt
            younger than 20 s more), and so that writing takes a quarter of the time at most. Saves that are
            asked for otherwise come on top. (CheckFreq: Mohan et al., FAST '21.)

    Raises ConfigurationError for numbers below 1, a state `at` which nothing says how often to save, another word for
    `durable`, and an `overhead` that is no share or comes with another rule for batches.
    """

    def __init__(
        self,
        every_batches: int | None = None,
        every_epochs: int | None = BY_DEFAULT,
        every_seconds: float | None = None,
        keep_last: int = 2,
        best: str | None = None,
        mode: Direction | None = None,
        keep_every_epochs: int | None = None,
        keep_first: bool = True,
        at: State | str | Collection[State | str] | None = None,
        durable: Literal["local", "remote"] = "local",
        overhead: float | None = None,
    ) -> None:
        if every_epochs is BY_DEFAULT:
            every_epochs = 1 if overhead is None else None
        for name, value in (
            ("every_batches", every_batches),
            ("every_epochs", every_epochs),
            ("keep_last", keep_last),
            ("keep_every_epochs", keep_every_epochs),
        ):
            check_whole(f"Checkpointing: {name}", value, optional=True)
        check_positive("Checkpointing: every_seconds", every_seconds, unit="seconds", optional=True)
        if overhead is not None:
            _check_overhead(overhead, every_batches=every_batches, every_seconds=every_seconds)
        self.every_batches = every_batches
        self.every_epochs = every_epochs
        self.every_seconds = every_seconds
        self.overhead = overhead
        self.keep_last = keep_last
        self.best = Watched(best, direction_of(best, mode)) if best is not None else None
        self.keep_every_epochs = keep_every_epochs
        self.keep_first = keep_first
        self.at = _states(at)
        if durable not in ("local", "remote"):
            raise ConfigurationError(f'Checkpointing: durable is {durable!r}; expected "local" or "remote"')
        self.durable = durable
        if self.at & _OF_A_BATCH and not (every_batches or every_seconds or overhead):
            raise ConfigurationError(
                f"Checkpointing: at is {_named(self.at)}, with nothing to say how often; expected every_batches=, "
                "every_seconds= or overhead= as well"
            )
        if self.at & _OF_AN_EPOCH and not every_epochs:
            raise ConfigurationError(
                f"Checkpointing: at is {_named(self.at)}, with every_epochs={every_epochs}; expected a number"
            )
        self.best_value: float | None = None
        self._former: tuple[Any, float | None] | None = None
        """The best value of another metric, which a checkpoint had; kept until there is one of this metric."""
        self._last_save = 0.0
        self._rhythm = None if overhead is None else Rhythm(overhead)
        self._measured: Any = None
        """What an earlier attempt measured, kept where this one measures nothing."""

    def attach(self, trainer: Trainer) -> None:
        """Hook only what is asked for."""
        super().attach(trainer)
        if self._rhythm is not None:
            trainer.before(Trigger.END_BATCH)(self._computed)
        if self.every_batches or self.every_seconds or self.overhead or trainer.max_batches is not None:
            trainer.after(Trigger.END_BATCH)(self._after_batch)
        for state in self.at & _OF_A_BATCH - {State.BATCH_END}:
            trainer.before(_LEADS_TO[state])(partial(self._before_batch_state, state))
        if State.EPOCH_START in self.at:
            trainer.before(Trigger.BEGIN_EPOCH)(self._before_epoch)
        if State.HALTED in self.at:
            trainer.on(State.HALTED)(self._on_halted)
        trainer.on(State.DONE)(self._save)

    def on_train_begin(self) -> None:
        """Begin to count the seconds."""
        self._last_save = time.monotonic()
        if self._rhythm is not None:
            self._rhythm.begin()

    def _save(self, at: State | None = None) -> None:
        if self.trainer.rehearsing:
            return
        self._last_save = time.monotonic()
        save = self.trainer.save(at)
        if self._rhythm is not None:
            self._rhythm.saved(save)

    def _computed(self) -> None:
        if self._rhythm is not None and not (self.trainer.replaying or self.trainer.rehearsing):
            self._rhythm.computed()

    def _after_batch(self) -> None:
        # Where max_batches is reached within an epoch, a longer run would go on from exactly here.
        elsewhere = self.at & _OF_A_BATCH and State.BATCH_END not in self.at
        if self.trainer.ending or (not elsewhere and self._batch_is_due(self.trainer.batches)):
            self._save()
        if self._rhythm is not None and not self.trainer.rehearsing:
            self._rhythm.goes_on()
            if (news := self._rhythm.news()) is not None:
                self.trainer.say(news)

    def _before_batch_state(self, state: State) -> None:
        if self._batch_is_due(self.trainer.batches + 1):
            self._save(at=state)

    def _batch_is_due(self, batches: int) -> bool:
        if self._rhythm is not None:
            return self._rhythm.due
        if self.every_batches and batches % self.every_batches == 0:
            return True
        return bool(self.every_seconds) and time.monotonic() - self._last_save >= (self.every_seconds or 0)

    def _before_epoch(self) -> None:
        if self._due(self.trainer.epoch + 1, self.every_epochs):
            self.trainer.save(at=State.EPOCH_START)

    def _on_halted(self) -> None:
        if not self.trainer.tainted:
            self._save()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Save where the epoch is due, is the best, or is the last."""
        if self._rhythm is not None and not self.trainer.rehearsing:
            self._rhythm.rests()
        better = self._improves(metrics)
        elsewhere = self.at & _OF_AN_EPOCH and State.EPOCH_END not in self.at
        due = not elsewhere and self._due(epoch, self.every_epochs)
        if better or due or self._due(epoch, self.keep_every_epochs) or self.trainer.ending:
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
        self.best_value, self._former = value, None
        return True

    @property
    def _watched(self) -> tuple[str, Direction] | None:
        return None if self.best is None else (self.best.name, self.best.mode)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and of what; what was measured of saving, with `overhead`."""
        measured = self._measured if self._rhythm is None else self._rhythm.measured.state_dict()
        best, value = self._former or (self._watched, self.best_value)
        return {
            "best": best,
            "value": value,
            **({} if measured is None else {"measured": measured}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best value, if it is still of the same metric, and the costs."""
        same = state["best"] == self._watched
        self.best_value = state["value"] if same else None
        self._former = None if same else (state["best"], state["value"])
        self._measured = state.get("measured")  # earlier versions have none
        if self._rhythm is not None:
            self._rhythm.know(Measured(self._measured))


_OF_A_BATCH = frozenset({State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP, State.BATCH_END})
_OF_AN_EPOCH = frozenset({State.EPOCH_START, State.EPOCH_END})
_LEADS_TO = {
    State.BATCH_START: Trigger.FETCH,
    State.FORWARD: Trigger.FORWARD,
    State.BACKWARD: Trigger.BACKWARD,
    State.STEP: Trigger.STEP,
}


def _states(at: State | str | Collection[State | str] | None) -> frozenset[State]:
    states = [at] if isinstance(at, State | str) else list(at or ())
    return frozenset(named(State, state, "Checkpointing: at") for state in states)


def _check_overhead(overhead: Any, **others: float | None) -> None:
    if isinstance(overhead, bool) or not isinstance(overhead, int | float) or not 0 < overhead < 1:
        raise ConfigurationError(
            f"Checkpointing: overhead is {overhead!r}; expected a share of the time between 0 and 1, such as 0.03"
        )
    for name, value in others.items():
        if value is not None:
            raise ConfigurationError(
                f"Checkpointing: overhead={overhead!r} says how often batches are saved, and so does "
                f"{name}={value!r}; expected one of them"
            )


def _named(states: Collection[State]) -> str:
    return ", ".join(sorted(state.value for state in states))


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

    The newest of all always stays, and so does the newest one made before the end; the first, of IDLE, by default.
    """
    by_age = sorted(checkpoints, key=lambda info: info.seq, reverse=True)
    keep = {info.name for info in by_age[:1]}
    keep.update(info.name for info in [i for i in by_age if i.state is not State.DONE][: settings.keep_last])
    keep.update(info.name for info in [i for i in by_age if i.purpose == BEFORE_THE_END][:1])
    if settings.keep_first:
        keep.update(info.name for info in by_age if info.state is State.IDLE or info.purpose == BRANCH)
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
