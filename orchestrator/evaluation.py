"""Evaluation: a pass of its own machine over a loader, after which the training is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from orchestrator import late
from orchestrator.data import BatchStream
from orchestrator.late_work import LateEvaluationWork
from orchestrator.loop import Asked, Hook, Loop
from orchestrator.metrics import EpochMetrics, Metric
from orchestrator.numerics import Precision
from orchestrator.phase import Forward
from orchestrator.policy import Situation
from orchestrator.requests import Requests
from orchestrator.signals import GiveWay
from orchestrator.snapshot.capture import capture_random, restore_random
from orchestrator.work import EvaluationWork, Place
from states.table import EVALUATION, State, Trigger

__all__ = ["Evaluation", "as_it_was"]

Journal = Callable[[int, EvaluationWork], int | None]

_NOBODY, _ALWAYS = Requests(), Requests(open=True)


@contextmanager
def as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put random states and every module's own train or eval mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    random = capture_random([device] if device.type == "cuda" else [])
    model.eval()
    try:
        yield
    finally:
        restore_random(random)
        for module, training in modes:
            module.training = training


class Evaluation:
    """Evaluates models over one loader; a pass goes from IDLE to DONE, or to HALTED if abandoned."""

    def __init__(
        self,
        loader: Any,
        *,
        name: str,
        forward: Forward,
        metrics: dict[str, Metric],
        device: torch.device,
        precision: Precision,
        journal: Journal | None = None,
    ) -> None:
        self.name = name
        self.stream = BatchStream(loader, role=name or "evaluation")
        self._situation = Situation(evaluating=True)
        epoch_metrics = EpochMetrics(metrics)
        epoch_metrics.to(device)
        self._device = device
        work: dict[str, Any] = {
            "model": nn.Module(),
            "forward": forward,
            "stream": self.stream,
            "metrics": epoch_metrics,
            "device": device,
            "precision": precision,
            "situation": self._situation,
            "place": Place(),
        }
        record = self._unrecorded if journal is None else lambda arc: journal(arc, self.work)
        self.work: EvaluationWork
        if (link := late.link_to(device)) is None:
            self.work = EvaluationWork(**work)
        else:
            self.work = reading_late = LateEvaluationWork(link=link, **work)
            record = partial(reading_late.write, record=record)
        self._loop = Loop(EVALUATION, self.work.table(), self._situation, record)

    @staticmethod
    def _unrecorded(arc: int) -> int | None:
        return None

    def run(
        self,
        model: nn.Module,
        epoch: int,
        asked: Asked = _NOBODY,
        halting: Callable[[], bool] = lambda: False,
        writer: Callable[[int], Hook] | None = None,
        batches: int | None = None,
    ) -> dict[str, float]:
        """One pass of `model` over the loader; the metrics over all of it. `writer` is as for `Loop.run`.

        With `batches` it ends after so many of them, and `halting` is looked at after each transition. Raises
        GiveWay as soon as `halting()`, which is looked at wherever `asked.open`.
        """
        work, situation = self.work, self._situation
        self._loop.stand(State.IDLE)
        situation.halt = False
        situation.batches_left = True
        work.model, work.place.epoch, work.place.batches = model, epoch, 0

        def look_up() -> None:
            situation.halt = situation.halt or halting()
            if batches is not None:
                situation.batches_left = work.place.batches < batches

        with as_it_was(model, self._device):
            self._loop.run(asked if batches is None else _ALWAYS, look_up, writer)
        if self._loop.state is State.HALTED:
            raise GiveWay
        return dict(work.values)

    def abandon(self) -> None:
        """Journal the end of a pass that an exception broke off."""
        if self._loop.state not in (State.IDLE, State.DONE, State.HALTED):
            self._loop.fire(Trigger.HALT)

    def close(self) -> None:
        """End the loader's workers."""
        self.stream.close()
