"""Rehearsal: what a training consists of done once and undone, so that what would fail after hours fails now."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from torch.nn.parameter import is_lazy

from orchestrator import recovery
from orchestrator.aside import Aside, RehearsalError, undone
from orchestrator.attempt import manifest_of
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.logs.progress import batches_left
from orchestrator.callbacks.logs.record import quantity, span
from orchestrator.errors import ConfigurationError, TaintedError
from orchestrator.policy import next_trigger
from orchestrator.snapshot.names import parameter_slots
from orchestrator.snapshot.storage import LEFTOVER, checkpoint_name
from orchestrator.snapshot.writer import CheckpointWriter
from states.errors import InterlockError
from states.table import TERMINAL, State, Trigger
from tracking.runs import RunFolder, create_run

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["DiskFullError", "Rehearsal", "RehearsalError", "checkpoints_at_once", "rehearse"]

_BATCHES = 2
"""The second shows what the first cannot: a graph that is used twice, and how long one takes once all is warm."""

_SCRATCH = ".rehearsal-"
_DRAFTS = f"{LEFTOVER}rehearsal"
"""Where a run's checkpoints are: what a rehearsal leaves that is killed, the next attempt removes."""


class DiskFullError(InterlockError, OSError):
    """The checkpoints that a training keeps have no room on the disk."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found. Times are in seconds, sizes in bytes, and estimates from one batch each."""

    seconds: float
    """Of all of it."""
    batches: int
    """Trained, and undone."""
    batch_s: float | None
    """A batch, after the first; None where none was left to train."""
    validation: Mapping[str, float]
    """A batch of each validation loader, after the first where there was another."""
    checkpoint_bytes: int | None
    """Of the checkpoint; None where the training makes none."""
    save_s: float
    """Until it was durable."""
    restore_s: float
    """Reading it, putting it back, and comparing."""
    estimate_s: float | None
    """The rest of the training, validation included, saving not; None where its length is not known."""
    disk_needed: int
    """The most that checkpoints will take beside those that are there."""
    disk_free: int
    """Where the run is."""

    def __str__(self) -> str:
        """All of it in one line."""
        done = []
        if self.batch_s is not None:
            batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
            done.append(f"{batches} of {quantity('batch_time', self.batch_s)}")
        done += [f"{name} of {quantity('batch_time', seconds)}" for name, seconds in self.validation.items()]
        if self.checkpoint_bytes is not None:
            took = f"written in {span(self.save_s)} and restored in {span(self.restore_s)}, bit for bit"
            done.append(f"a checkpoint of {_size(self.checkpoint_bytes)}, {took}")
        ahead = [] if self.estimate_s is None else [f"training takes about {span(self.estimate_s)}"]
        if self.checkpoint_bytes is not None:
            ahead.append(f"checkpoints up to {_size(self.disk_needed)} of {_size(self.disk_free)} free")
        return "; ".join(
            [
                f"rehearsed in {span(self.seconds)}: {', '.join(done) or 'nothing is left to train'}",
                "all undone",
                *ahead,
            ]
        )


def rehearse(trainer: Trainer) -> Rehearsal | None:
    """Rehearse where the trainer stands; see `Trainer.rehearse`. None where a signal has broken it off."""
    _check(trainer)
    began = time.perf_counter()
    performance = _Performance(trainer)
    try:
        with _stage(trainer) as run, undone(trainer, performance.begin):
            found = performance.give(run)
    except Exception as error:
        if not isinstance(error, RehearsalError):
            error.add_note(f"while rehearsing: {performance.doing}; the training stands as it did before")
        raise
    return None if found is None else replace(found, seconds=time.perf_counter() - began)


def _check(trainer: Trainer) -> None:
    training = trainer._training
    if training.tainted:
        raise TaintedError(
            "a transition failed half-way, so memory holds no state of the training to rehearse from: build another "
            "Trainer"
        )
    if trainer.state in TERMINAL:
        raise ConfigurationError(
            f"rehearse() in {trainer.state.value}, where the attempt has ended; expected a training that has not "
            "started, or is under way: fit(resume=..., rehearse=True) rehearses from where it is resumed"
        )
    if trainer.state is State.FORWARD and training.work.before_forward is None:
        raise ConfigurationError(
            "rehearse() in FORWARD, whose graph cannot be kept; expected another state: advance() first"
        )
    lazy = [s.name for s in parameter_slots(trainer.model) if s.tensor is not None and is_lazy(s.tensor)]
    if lazy:
        raise ConfigurationError(
            f"rehearse(): {', '.join(lazy[:3])} of the model {'has' if len(lazy) == 1 else 'have'} no shape before the "
            "first batch, which cannot be undone; expected a model with shapes: call it on a batch once before the "
            "Trainer is built"
        )


# -- what is done ----------------------------------------------------------------------------------------


class _Performance:
    """The stretch that is rehearsed, and how long its parts took. `doing` says in words what is under way."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._training = trainer._training
        self.doing = "taking the training state, which is put back afterwards"
        self._batches: list[float] = []
        self._validation: dict[str, float] = {}
        self._values: dict[str, float] | None = None
        self._began = time.perf_counter()
        self._validating_s = 0.0
        self._ends = 0

    def begin(self, aside: Aside) -> None:
        """What the training was before is kept."""
        self._aside = aside
        self.doing = "the beginning: init_from, and the callbacks' on_train_begin"

    def give(self, run: RunFolder) -> Rehearsal | None:
        """All of it; None where a signal has broken it off."""
        trainer, training = self._trainer, self._training
        estimate_for = _left(trainer)
        work = training.work
        work.validate = self._validate
        if work.validate_every is not None:
            work.validate_every = 1
        while (trigger := self._next()) is not None:
            self._fire(trigger)
            if self._asked_to_leave():
                return None
        size, save_s, restore_s = None, 0.0, 0.0
        needed, free = 0, shutil.disk_usage(run.path).free
        settings = trainer._settings.checkpoint
        if settings is not None:
            path, save_s = self._save(run)
            size = _bytes_of(path)
            needed = _room(settings, size, estimate_for, run, free)
            restore_s = self._restore(path)
        batch_s = _mean(self._batches)
        return Rehearsal(
            seconds=0.0,
            batches=len(self._batches),
            batch_s=batch_s,
            validation=dict(self._validation),
            checkpoint_bytes=size,
            save_s=save_s,
            restore_s=restore_s,
            estimate_s=self._estimate(batch_s, estimate_for),
            disk_needed=needed,
            disk_free=free,
        )

    # -- transitions

    def _next(self) -> Trigger | None:
        """The next trigger; None where enough was done, or nothing is left but the end."""
        work, situation = self._training.work, self._training.work.situation
        if self._ends and (self._batches or self._ends > 1) and situation.state is State.EPOCH_END:
            return None
        if situation.state is State.BATCH_END and len(self._batches) >= _BATCHES and not work.window.count:
            situation.has_batch = False  # the epoch ends here
        trigger = next_trigger(situation)
        return None if trigger is Trigger.FINISH else trigger

    def _fire(self, trigger: Trigger) -> None:
        work = self._training.work
        if trigger is Trigger.FETCH:
            self._began, self._validating_s = time.perf_counter(), 0.0
        self.doing = _DOING[trigger]
        self._training.loop.fire(trigger)
        if trigger is Trigger.END_BATCH:
            work.settle()
            if work.samples:
                self._batches.append(time.perf_counter() - self._began - self._validating_s)
        elif trigger is Trigger.END_EPOCH:
            self._ends += 1

    def _asked_to_leave(self) -> bool:
        """Whether a signal wants to halt; raises what the training would halt on. Other requests are undone."""
        requests = self._training.requests
        halt = requests.halt
        if halt is not None and halt.signal:
            return True
        requests.halt = None
        if halt is not None and halt.error is not None:
            raise halt.error
        return False

    def _validate(self) -> dict[str, float]:
        """What validation does, with the first batches of each loader; once is enough."""
        if self._values is None:
            began, doing = time.perf_counter(), self.doing
            trainer, training = self._trainer, self._training
            self._values = training.validation.run(
                trainer.validation_model,
                trainer.epoch,
                training.requests,
                self._time_validation,
                self._begin_validation,
                _BATCHES,
            )
            self.doing = doing
            self._validating_s = time.perf_counter() - began
        return dict(self._values)

    def _begin_validation(self) -> None:
        self.doing = f"validation loader {self._trainer.validating!r}, its first batches"
        self._seen, self._mark = 0, time.perf_counter()

    def _time_validation(self) -> bool:
        """Called after each transition of a pass."""
        evaluation, now = self._training.validation.under_way, time.perf_counter()
        if evaluation is not None and evaluation.work.place.batches > self._seen:
            evaluation.work.settle()
            self._seen = evaluation.work.place.batches
            self._validation[evaluation.name] = now - self._mark
            self._mark = now
        return False

    # -- a checkpoint

    def _save(self, run: RunFolder) -> tuple[Path, float]:
        """Write a checkpoint as a save would; its path, and seconds until it was durable."""
        trainer, training = self._trainer, self._training
        self.doing = "a checkpoint: taking the training state at an epoch's end, and writing it"
        work, state = training.work, trainer.state
        metrics = work.history[-1] if state is State.EPOCH_END and work.history else {}
        data = training.snapshots.fingerprints()
        tree = training.snapshots.capture(state)
        began, place = time.perf_counter(), work.place
        name = checkpoint_name(place.batches, max(trainer.attempt, 1), place.epoch, place.batch, state)
        manifest = manifest_of(
            run,
            place.batches,
            max(trainer.attempt, 1),
            place,
            state,
            "",
            metrics,
            trainer._settings,
            data,
            time.time_ns(),
        )
        writer = CheckpointWriter(run.checkpoints / _DRAFTS)
        try:
            path = writer.submit(name, tree, manifest).wait()
        finally:
            with contextlib.suppress(Exception):  # `wait` has raised it
                writer.close()
        return path, time.perf_counter() - began

    def _restore(self, path: Path) -> float:
        """Read it, and put it back over the state from before, as a resume does; seconds."""
        training = self._training
        self.doing = "a checkpoint: reading and restoring it"
        self._aside.restore()  # else what a checkpoint does not restore would be there all the same
        began = time.perf_counter()
        found = recovery.read(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a resume would say of the same trainer
            found = recovery.check(found, training.snapshots, self._trainer._settings, training.work.stream)
        recovery.restore(found, training.snapshots)
        return time.perf_counter() - began

    def _estimate(self, batch_s: float | None, ahead: _Ahead) -> float | None:
        if ahead.batches is None or batch_s is None:
            return None
        seconds = ahead.batches * batch_s
        for name, of_batch in self._validation.items():
            length = self._training.validation.evaluations[name].stream.length
            if length is None or ahead.validations is None:
                return None
            seconds += ahead.validations * length * of_batch
        return seconds


_DOING = {
    Trigger.BEGIN_EPOCH: "the beginning of an epoch",
    Trigger.FETCH: "a training batch: taking it from the loader",
    Trigger.FORWARD: "a training batch: its forward pass",
    Trigger.BACKWARD: "a training batch: its backward pass",
    Trigger.STEP: "a training batch: the optimizer's step",
    Trigger.END_BATCH: "a training batch: its end",
    Trigger.END_EPOCH: "the end of an epoch: its metrics, schedulers and callbacks",
}


def _mean(seconds: list[float]) -> float | None:
    """Of all but the first, for which workers start and kernels are chosen."""
    later = seconds[1:] or seconds
    return sum(later) / len(later) if later else None


# -- what lies ahead, and the room for it ----------------------------------------------------------------


@dataclass(frozen=True)
class _Ahead:
    """How much of the training is left; None where that is not known."""

    batches: int | None
    epochs: int | None
    validations: int | None


def _left(trainer: Trainer) -> _Ahead:
    place, length = trainer._training.work.place, trainer.batches_per_epoch
    done = place.batch + (1 if trainer.state in (State.BATCH_END, State.EPOCH_END) else 0)
    left = batches_left(
        place.batches, max(place.epoch, 0), max(done, 0), trainer.epochs, length, trainer.max_batches
    )
    over = place.epoch + (1 if trainer.state is State.EPOCH_END else 0)
    epochs = None if trainer.epochs is None else trainer.epochs - max(over, 0)
    if left is not None and length:
        by_batches = -(-left // length)
        epochs = by_batches if epochs is None else min(epochs, by_batches)
    every = trainer._training.work.validate_every
    return _Ahead(left, epochs, epochs if every is None else None if left is None else left // every)


def checkpoints_at_once(settings: Checkpointing, batches: int | None, epochs: int | None) -> tuple[int, str]:
    """How many checkpoints, beside that of IDLE, are on the disk at most at once; and which, in words.

    `batches` and `epochs` are left to train; None where that is not known.
    """
    saves: int | None = 1  # at the end
    for every, left in ((settings.every_epochs, epochs), (settings.every_batches, batches)):
        if every is not None and saves is not None:
            saves = None if left is None else saves + left // every
    if settings.overhead is not None or settings.every_seconds is not None:
        saves = None
    newest = settings.keep_last + 1  # a new one is whole before the oldest goes
    count = newest if saves is None else min(newest, saves)
    words = [f"the last {settings.keep_last}", "one that is being written"]
    if settings.keep_every_epochs and epochs:
        of_epochs = epochs // settings.keep_every_epochs
        count += max(of_epochs - settings.keep_last, 0)
        words.append(f"{of_epochs} that stay for good")
    if settings.best is not None and (saves is None or saves > count):
        count += 1
        words.append("the best")
    return count, ", ".join(words)


def _room(settings: Checkpointing, size: int, ahead: _Ahead, run: RunFolder, free: int) -> int:
    """The bytes that checkpoints will need at most; raises DiskFullError where there are not as many."""
    count, which = checkpoints_at_once(settings, ahead.batches, ahead.epochs)
    there = sum(map(_bytes_of, run.checkpoints.glob("[0-9]*")))
    needed = max(count * size - there, 0)
    if needed > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"checkpoints need {_size(needed)} more on the disk of {run.path.parent}, which has {_size(free)} free: "
            f"{count} of {_size(size)} at once ({which}); expected room for them: free some, keep fewer "
            "(Checkpointing(keep_last=...)), or give another root=",
        )
    return needed


def _bytes_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB"


# -- where it is done ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stage(trainer: Trainer) -> Iterator[RunFolder]:
    """The run's folder; or before there is one a folder like it, thrown away afterwards."""
    attempt, run = trainer._training.attempt, trainer.run
    if attempt is not None and not attempt.closed:
        try:
            yield attempt.run
        finally:
            shutil.rmtree(attempt.run.checkpoints / _DRAFTS, ignore_errors=True)
        return
    root = trainer._settings.root
    made = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    _clean(root)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{socket.gethostname()}-{os.getpid()}-", dir=root))
    try:
        trainer.run = create_run(scratch, trainer._settings.name)
        yield trainer.run
    finally:
        trainer.run = run
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody has put something there meanwhile
            for path in made:
                path.rmdir()


def _clean(root: Path) -> None:
    """Remove what rehearsals of this machine have left that were killed."""
    for path in root.glob(f"{_SCRATCH}{socket.gethostname()}-*"):
        pid = path.name.rsplit("-", 2)[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
