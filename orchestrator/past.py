"""Going back: to stand at any moment of a run again, or to run a stretch of it again with new hooks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import configuration, recovery
from orchestrator.callbacks.base import Callback, overrides
from orchestrator.divergence import Divergence
from orchestrator.errors import ConfigurationError
from orchestrator.retrieval import retrieve
from orchestrator.snapshot.tensors import replicas
from states.errors import InterlockError
from states.table import TERMINAL, State, Trigger
from tracking.fetching import is_reference
from tracking.journal import Journal, settle
from tracking.rows import Transition
from tracking.runs import Lease, LeaseHeldError, RunFolder, find_run

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = [
    "Moment",
    "Past",
    "Replay",
    "SeekError",
    "Stretch",
    "attach",
    "fire",
    "last_epoch",
    "moment_at",
    "replay",
    "replaying",
    "run_of",
    "seek",
]

Stretch = int | tuple[int, int]
"""An epoch, or (epoch, batch)."""


class SeekError(InterlockError):
    """There is no such moment in the run, or it cannot be reached again."""


@dataclass(frozen=True)
class Moment:
    """A moment of a run: after transition `seq`, in `state`."""

    seq: int
    epoch: int
    """Counted from 0; -1 before the first."""
    batch: int
    """The same, within the epoch."""
    phase: str
    """Empty where a batch has one only."""
    state: State

    def __str__(self) -> str:
        if self.epoch < 0:
            return f"the beginning ({self.state.value})"
        batch = f", batch {self.batch}" if self.batch >= 0 else ""
        phase = f", phase {self.phase!r}" if self.phase else ""
        return f"epoch {self.epoch}{batch}{phase} ({self.state.value})"


BEGINNING = Moment(0, -1, -1, "", State.IDLE)


@dataclass(frozen=True)
class Past:
    """Where a trainer has gone back to. Nothing is recorded there; going on makes a run of its own."""

    run: RunFolder
    """The run that it is a moment of."""
    moment: Moment
    """Where it stands."""
    checkpoint: str
    """The checkpoint that it was reached from."""
    replayed: int
    """Batches done again on the way."""


@dataclass(frozen=True)
class Replay:
    """What a stretch of the past was when it was run again."""

    run: Path
    """The run's folder."""
    checkpoint: str
    """The checkpoint that was started from."""
    first: Moment
    """Where the stretch began."""
    last: Moment
    """Where it ended."""
    batches: int
    """Batches of the stretch."""
    divergence: Divergence | None
    """The first loss that was not the recorded one; None where all were, bit for bit."""


def seek(
    trainer: Trainer,
    epoch: int | None,
    batch: int | None,
    state: State | None,
    phase: str | None,
    run: str | os.PathLike[str] | None,
) -> Past:
    """Stand at a moment of the run again; see `Trainer.seek`."""
    folder = run_of(trainer, run)
    moment = _moment(folder, epoch, batch, state, phase)
    found = recovery.nearest(folder, moment.seq)
    found = recovery.check(
        found, trainer._training.snapshots, trainer._settings, trainer._training.work.stream
    )
    trainer.close()
    with replaying(trainer):
        began = _begin(trainer, folder, found, until=moment)
        _go_on(trainer, moment)
    return Past(folder, moment, found.info.name, trainer.batches - began)


def replay(
    trainer: Trainer,
    first: Stretch,
    last: Stretch,
    callbacks: Sequence[Callback],
    run: str | os.PathLike[str] | None,
    during: Callable[[Trainer], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Replay:
    """Run a stretch of the run again; see `Trainer.replay`. `during` is entered where it begins, left where it ends."""
    folder = run_of(trainer, run)
    start, end = _before(folder, first), _end(folder, last)
    if end.seq <= start.seq:
        raise SeekError(f"replay from {first} to {last}: expected the first not to come after the last")
    found = recovery.nearest(folder, start.seq)
    found = recovery.check(
        found, trainer._training.snapshots, trainer._settings, trainer._training.work.stream
    )
    with _set_aside(trainer), replaying(trainer), trainer._training.loop.hooks_kept():
        _begin(trainer, folder, found, until=end)
        _go_on(trainer, start)
        began = trainer.batches
        attach(trainer, callbacks)
        with during(trainer):
            _go_on(trainer, end)
        return Replay(folder.path, found.info.name, start, end, trainer.batches - began, trainer.divergence)


def attach(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Add callbacks to a trainer that is replaying."""
    for callback in callbacks:
        callback.attach(trainer)
        trainer._add_hooks(callback)
        if overrides(callback, "on_train_begin"):
            callback.on_train_begin()


# -- which run, and which moment of it ---------------------------------------------------------------


def run_of(trainer: Trainer, named: str | os.PathLike[str] | None) -> RunFolder:
    """The run that is meant, with what is in its journal up to date; raises SeekError if there is none."""
    attempt, settings = trainer._training.attempt, trainer._settings
    if attempt is not None and not attempt.closed:
        attempt.sync()
    if is_reference(named):
        run = retrieve(str(named), settings.track, settings.root).run
    elif named is not None:
        run = find_run(os.fspath(named), settings.root)
    elif trainer._past is not None:
        run = trainer._past.run
    elif trainer.run is not None:
        run = trainer.run
    else:
        newest = recovery.newest_of_name(settings)
        if newest is None:
            raise SeekError(
                f"{settings.root} has no run named {settings.name!r}; expected one to go back in: pass run= a run's "
                "name or folder"
            )
        run = newest
    with contextlib.suppress(LeaseHeldError), Lease.acquire(run) as lease:
        settle(run, lease)  # of a process that was killed, the recorder knows more than the journal
    return run


def _moment(
    run: RunFolder, epoch: int | None, batch: int | None, state: State | None, phase: str | None
) -> Moment:
    if state is None:
        state = State.EPOCH_START if batch is None else State.BATCH_START
    if state is State.IDLE:
        return BEGINNING
    if epoch is None or state in TERMINAL:
        raise SeekError(
            f"seek to state={state.value}, epoch={epoch}: expected an epoch, and a state that training goes on "
            "from; for instance seek(epoch=2, batch=113, state=State.FORWARD)"
        )
    return moment_at(run, epoch, batch, state, phase)


def moment_at(
    run: RunFolder, epoch: int, batch: int | None, state: State, phase: str | None = None
) -> Moment:
    """The first moment at which a run stood there; None means any. Raises SeekError if it never did."""
    with Journal.open(run) as journal:
        row = journal.find(epoch, batch, state, phase)
        last = None if row is not None else journal.last_transition()
    if row is None:
        place = f"epoch {epoch}" + ("" if batch is None else f", batch {batch}")
        place += "" if phase is None else f", phase {phase!r}"
        reached = "nothing" if last is None else str(_of(last))
        raise SeekError(
            f"{run.id} was never in {state.value} at {place}; expected a moment that it was in. It goes up to "
            f"{reached}; see: interlock log {run.id} --epoch {epoch}"
        )
    return _of(row)


def _of(row: Transition) -> Moment:
    return Moment(row.seq, row.epoch, row.batch, row.phase, row.dest)


def _before(run: RunFolder, first: Stretch) -> Moment:
    """The moment before a stretch."""
    if isinstance(first, int):
        return moment_at(run, first - 1, None, State.EPOCH_END) if first > 0 else BEGINNING
    epoch, batch = first
    if batch > 0:
        return moment_at(run, epoch, batch - 1, State.BATCH_END)
    return moment_at(run, epoch, None, State.EPOCH_START)


def _end(run: RunFolder, last: Stretch) -> Moment:
    if isinstance(last, int):
        return moment_at(run, last, None, State.EPOCH_END)
    return moment_at(run, *last, State.BATCH_END)


def last_epoch(run: RunFolder) -> int:
    """The last epoch that is complete. Raises SeekError if none is."""
    with Journal.open(run) as journal:
        last = journal.last_transition()
        epochs = () if last is None else (last.epoch, last.epoch - 1)
        for epoch in epochs:
            if epoch >= 0 and journal.find(epoch, None, State.EPOCH_END):
                return epoch
    raise SeekError(
        f"{run.id} has no complete epoch (it goes up to {'nothing' if last is None else _of(last)}); expected one, or "
        "where to begin and to end, as epoch and batch"
    )


# -- getting there -----------------------------------------------------------------------------------


def _begin(trainer: Trainer, run: RunFolder, found: recovery.Found, until: Moment) -> int:
    """Stand at the checkpoint, with nothing that is recorded; how many batches were done there."""
    configuration.set_determinism(trainer._settings)
    training = trainer._training
    training.attempt, trainer._past, trainer.run = None, None, None
    training.requests.clear()
    training.renew(recovery.losses_after(run, found, until.seq))
    training.found = found
    for hook in trainer._on_train_begin:
        hook()
    training.snapshots.begin(trainer._make_watch())
    training.loop.stand(State.HALTED)
    training.loop.fire(Trigger.RESUME, found.state)
    _check_halt(trainer)
    return trainer.batches


def _go_on(trainer: Trainer, moment: Moment) -> None:
    """Fire transitions until the trainer stands there."""
    trainer._training.work.keep = (
        trainer._training.snapshots.before_forward if moment.state is State.FORWARD else None
    )
    while not _stands_at(trainer, moment):
        if (trainer.epoch, trainer.batch) > (moment.epoch, moment.batch) or not trainer._training.fire_next():
            raise SeekError(
                f"{moment} was not reached: done again, the training went another way, up to epoch {trainer.epoch}, "
                f"batch {trainer.batch} ({trainer.state.value}); expected the arguments and the code that the run was "
                "made with"
            )
        _check_halt(trainer)


def fire(trainer: Trainer) -> None:
    """The next transition of a trainer that is replaying; raises what it would halt on."""
    trainer._training.fire_next()
    _check_halt(trainer)


def _check_halt(trainer: Trainer) -> None:
    """A halt that was asked for while the past is done again is an error of its own, or nobody's business."""
    halt, trainer._training.requests.halt = trainer._training.requests.halt, None
    if halt is not None or trainer.state is State.HALTED:
        trainer._training.tainted = True
        if halt is not None and halt.error is not None:
            raise halt.error
        raise SeekError(f"halted on the way: {'' if halt is None else halt.reason}")


def _stands_at(trainer: Trainer, moment: Moment) -> bool:
    place = trainer.epoch, trainer.batch, trainer.state
    return place == (moment.epoch, moment.batch, moment.state) and trainer.phase == moment.phase


@contextlib.contextmanager
def replaying(trainer: Trainer) -> Iterator[None]:
    """What the trainer does meanwhile is the past, done again: nothing is recorded, and callbacks can tell."""
    trainer.replaying = True
    try:
        yield
    except BaseException:
        trainer._training.tainted = True
        raise
    finally:
        trainer.replaying = False
        trainer._training.expected = None
        trainer._training.work.keep = None


@contextlib.contextmanager
def _set_aside(trainer: Trainer) -> Iterator[None]:
    """Put the trainer back to where it stands now, whatever happens to it meanwhile.

    One whose memory holds no state of a training, because it failed, stays as the replay leaves it.
    """
    training = trainer._training
    machine, aside = trainer.state, None
    carried = training.halted_in if machine is State.HALTED else machine
    if carried is State.FORWARD and training.work.before_forward is None:
        raise ConfigurationError(
            "replay() in FORWARD, whose graph cannot be kept; expected another state: advance() first"
        )
    if not training.tainted and carried is not None:
        aside = replicas(training.snapshots.capture(carried))
    run, past = trainer.run, trainer._past
    names = ("attempt", "ended", "left", "halted_in", "expected", "divergence", "tainted")
    kept: dict[str, Any] = {name: getattr(training, name) for name in names}
    requests = training.requests.copy()
    situation_halt = training.work.situation.halt
    try:
        yield
    finally:
        if aside is not None:
            training.requests.clear()
            training.snapshots.restore(aside)
        for name, value in kept.items():
            setattr(training, name, value)
        trainer.run, trainer._past = run, past
        training.requests.take(requests)
        training.work.situation.halt = situation_halt
        training.loop.stand(machine)
        if training.attempt is None or training.attempt.closed:
            training.work.stream.close()
            configuration.restore_determinism(trainer._settings)
        else:
            training.attempt.restart_clock()
