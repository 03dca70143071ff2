"""Validation: every validation loader in turn, each by a machine of its own, within a transition of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from orchestrator.evaluation import Evaluation
from orchestrator.loop import Asked, Hook
from orchestrator.signals import GiveWay
from orchestrator.snapshot.kept import Kept

__all__ = ["Validation"]


class Validation:
    """The evaluations of a training, by the names of their loaders.

    `under_way` is the one that runs, None between two.
    """

    def __init__(self, evaluations: Mapping[str, Evaluation]) -> None:
        self.evaluations = evaluations
        self.under_way: Evaluation | None = None

    @property
    def scopes(self) -> list[str]:
        """What their transitions are journaled under."""
        return [f"validation/{name}" for name in self.evaluations]

    @property
    def waiting(self) -> bool:
        """Whether one is waiting for a data worker."""
        return any(evaluation.stream.waiting for evaluation in self.evaluations.values())

    def run(
        self,
        model: nn.Module,
        epoch: int,
        asked: Asked,
        halting: Callable[[], bool],
        begin: Callable[[], Callable[[int], Hook] | None],
        batches: int | None = None,
    ) -> dict[str, float]:
        """The metrics of all loaders, `NAME/KEY`; `begin` is called before each, and gives the writer of `Loop.run`.

        With `batches`, those of so many of each loader's.

        Raises GiveWay as soon as `halting()` (see `Evaluation.run`); generators and the model are then as before.
        """
        if not self.evaluations:
            return {}
        values: dict[str, float] = {}
        kept = Kept(model)
        before = {name: evaluation.stream.between_epochs() for name, evaluation in self.evaluations.items()}
        for name, evaluation in self.evaluations.items():
            self.under_way = evaluation
            writer = begin()
            try:
                found = evaluation.run(model, epoch, asked, halting, writer, batches)
            except GiveWay:
                for begun, state in before.items():
                    self.evaluations[begun].stream.load_state_dict(state)
                kept.put_back()
                raise
            values.update({f"{name}/{key}": value for key, value in found.items()})
        self.under_way = None
        return values

    def abandon(self) -> None:
        """Journal the end of a pass that an exception broke off."""
        for evaluation in self.evaluations.values():
            self.under_way = evaluation
            evaluation.abandon()
        self.under_way = None

    def close(self) -> None:
        """End the loaders' workers."""
        for evaluation in self.evaluations.values():
            evaluation.close()
