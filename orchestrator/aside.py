"""Aside: a training as it stands now, taken whole, and made what it was after something else was done with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from orchestrator import configuration, recovery, warm_start
from orchestrator.snapshot import capture
from orchestrator.snapshot.objects import MOST_ELEMENTS, AttributesKept, ContentsKept
from orchestrator.snapshot.tensors import replicas
from orchestrator.snapshot.users_code import is_users
from orchestrator.snapshot.watch import parts_of
from states.errors import InterlockError
from states.table import State

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["Aside", "RehearsalError", "undone"]

_HOST = torch.device("cpu")
_OF_WORK = ("note", "keep", "example", "wants_example")
_OF_TRAINING_WORK = ("validate", "validate_every")
_OF_TRAINING = ("attempt", "beside", "expected", "divergence", "found", "ended", "left", "halted_in")
_OF_TRAINER = ("run", "rehearsing", "validation_model", "_beginning")
_NOT_COMPARED = ("flags", "built")
"""Parts of a state that are the process's own, or the script's."""


class RehearsalError(InterlockError):
    """What a rehearsal has changed could not be put back."""


class Aside:
    """All of a training, taken when this is made: its state, and what no checkpoint has but the trainer's memory."""

    def __init__(self, trainer: Trainer) -> None:
        training = trainer._training
        self._trainer, self._training = trainer, training
        self._state = trainer.state
        self._works = [training.work, *(e.work for e in training.validation.evaluations.values())]
        self._kept: list[tuple[Any, dict[str, Any]]] = [
            (trainer, _values(trainer, _OF_TRAINER)),
            (training, _values(training, _OF_TRAINING)),
            (training.work, _values(training.work, _OF_TRAINING_WORK)),
            *((work, _values(work, [n for n in _OF_WORK if hasattr(work, n)])) for work in self._works),
            # Somebody may mend the data before the training begins.
            *((work.stream, _values(work.stream, ["_fingerprint"])) for work in self._works),
        ]
        self._requests = training.requests.copy()
        situation = training.work.situation
        self._situation = {field.name: getattr(situation, field.name) for field in fields(situation)}
        self._groups = [
            (optimizer, [(group, frozenset(group)) for group in optimizer.param_groups])
            for optimizer in trainer.optimizers
        ]
        # On the host: a device that the training fits on has no room for another one.
        self.tree: dict[str, Any] = replicas(training.snapshots.capture(self._state), _HOST)
        self._gradients = replicas(capture.capture_gradients(trainer.model, trainer.optimizers), _HOST)
        captured = {id(tensor) for tensor in (*trainer.model.parameters(), *trainer.model.buffers())}
        self._attributes = [
            AttributesKept(item, captured) for item in (*trainer._callbacks.values(), *trainer.optimizers)
        ]
        data = (
            item for item in parts_of(trainer._data) if is_users(type(item)) and hasattr(item, "__dict__")
        )
        self._attributes += [AttributesKept(item, captured, MOST_ELEMENTS) for item in data]
        self._contents = ContentsKept(training.snapshots.referred_to(), captured)

    def restore(self) -> None:
        """Make the training state what it was; the trainer's own memory is left as it is."""
        self._close_loaders()
        self._training.requests.clear()
        for optimizer, groups in self._groups:
            optimizer.param_groups[:] = [group for group, _ in groups]
            for group, names in groups:
                for name in group.keys() - names:
                    del group[name]
        self._training.snapshots.restore(self.tree)
        capture.restore_gradients(self._trainer.model, self._gradients, self._trainer.optimizers)
        for attributes in self._attributes:
            attributes.put_back()
        self._contents.put_back()

    def put_back(self) -> None:
        """Make everything what it was. Raises RehearsalError, naming what is not."""
        training, work = self._training, self._training.work
        training.validation.abandon()
        work._result = None
        for scaler in work.precision.scalers:
            if scaler is not None:  # one that is broken off between unscale_ and update would refuse the next
                scaler._per_optimizer_states.clear()
        self.restore()
        for item, values in self._kept:
            for name, value in values.items():
                setattr(item, name, value)
        for name, value in self._situation.items():
            setattr(work.situation, name, value)
        training.requests.take(self._requests)
        training.loop.stand(self._state)
        self._compare()
        self._close_loaders()  # workers have copies of the data set that have seen batches

    def _close_loaders(self) -> None:
        self._training.work.stream.close()
        self._training.validation.close()

    def _compare(self) -> None:
        again = self._training.snapshots.capture(self._state)
        different = capture.first_difference(
            *(capture.digests(tree, ignore=(*recovery.CLOCKS, *_NOT_COMPARED)) for tree in (self.tree, again))
        )
        if different is not None:
            raise RehearsalError(
                f"{different} is not what it was before the rehearsal; expected every bit to be equal. Does a "
                "state_dict of a callback, metric or scheduler leave something out, or change it? Build another "
                "Trainer, and train without rehearse=True"
            )


def _values(item: object, names: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in names}


@contextlib.contextmanager
def undone(trainer: Trainer, began: Callable[[Aside], object]) -> Iterator[None]:
    """What the trainer does meanwhile is recorded nowhere, and undone afterwards. `began` is told what is kept.

    Where it cannot be undone the trainer is tainted, and RehearsalError is raised. A halt that a signal has asked for
    meanwhile stays.
    """
    training, settings = trainer._training, trainer._settings
    open_attempt = training.attempt if training.attempt is not None and not training.attempt.closed else None
    begins = open_attempt is None and trainer._past is None
    was_deterministic = bool(settings._flags)
    configuration.set_determinism(settings)
    snapshots = training.snapshots.as_begun()
    try:
        if begins:
            training.snapshots.begin(trainer._make_watch())
        aside = Aside(trainer)
        trainer.rehearsing = True
        training.attempt, training.beside, training.expected = None, open_attempt, None
        training.requests.clear()
        training.work.keep = None
        try:
            with training.loop.hooks_kept():
                began(aside)
                if begins:
                    _begin(trainer)
                yield
        finally:
            halt = training.requests.halt
            try:
                aside.put_back()
            except BaseException as error:
                training.tainted, trainer.rehearsing = True, False
                training.attempt, training.beside = open_attempt, None
                training.loop.stand(State.IDLE if open_attempt is None else open_attempt.state)
                if isinstance(error, RehearsalError | KeyboardInterrupt):
                    raise
                raise RehearsalError(
                    f"the rehearsal could not be undone: {type(error).__name__}: {error}. Build another Trainer, and "
                    "train without rehearse=True"
                ) from error
            if halt is not None and halt.signal:
                training.requests.add_halt(halt)
    finally:
        training.snapshots.as_begun(snapshots)
        if not was_deterministic:
            configuration.restore_determinism(settings)
        if open_attempt is not None:
            open_attempt.restart_clock()


def _begin(trainer: Trainer) -> None:
    """What the beginning of a new run does to the training."""
    settings = trainer._settings
    if settings.init_from is not None:
        _, weights = warm_start.read(settings.init_from, settings.root, trainer.model)
        warm_start.apply(weights, trainer.model)
    trainer._beginning = True
    for hook in trainer._on_train_begin:
        hook()
    trainer._beginning = False
    trainer._training.snapshots.begin(trainer._make_watch())
