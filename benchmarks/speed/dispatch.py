"""Orchestration alone: what a batch costs when its work is nothing, everything written down included.

interlock's side is the loop that `fit` runs, with its journal: begin to end, five transitions a batch, each timed and
made durable, two hooks of the user's, and the final flush. Ignite's is an engine whose process function does
nothing, with two empty handlers, which writes nothing down.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Cost, alternate, arguments, compared, installed, report
from torch import nn

from orchestrator import Trainer
from states import Trigger


def nothing() -> None:
    """Work, and a hook."""


def nothing_processed(engine: Any, batch: Any) -> None:
    """What an engine of Ignite does with a batch."""


def nothing_handled(engine: Any) -> None:
    """A handler of Ignite's."""


def without_work(batches: int, root: Path, *, hooks: bool = True) -> Trainer:
    """A trainer whose transitions do nothing but say which comes next."""
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), [(torch.zeros(1, 1),) * 2], epochs=1,
        log=None, track=None, checkpoint=None, root=root,
    )  # fmt: skip
    if hooks:
        trainer.after(Trigger.FETCH)(nothing)
        trainer.after(Trigger.END_BATCH)(nothing)
    trainer.start()
    work, place = trainer._training.work, trainer._training.work.place
    situation = work.situation
    work.loss = 1.0

    def begin_epoch() -> None:
        place.epoch += 1

    def fetch() -> None:
        place.batch += 1
        situation.has_batch = place.batch + 1 < batches

    def end_epoch() -> None:
        situation.epochs_left = False
        work.history.append({})

    instead = {"begin_epoch": begin_epoch, "fetch": fetch, "end_epoch": end_epoch}
    for name, event in trainer._training.loop.machine.events.items():
        for transition in (one for of_source in event.transitions.values() for one in of_source):
            transition.before[-1] = instead.get(name, nothing)
    return trainer


def interlock(batches: int, *, hooks: bool = True) -> Cost:
    """One epoch, from its begin to the closed journal."""
    with tempfile.TemporaryDirectory() as root:
        trainer = without_work(batches, Path(root), hooks=hooks)
        with Cost.measured(batches) as cost:
            trainer.fit()
    return cost


def ignite(batches: int) -> Cost:
    """One epoch of an engine."""
    from ignite.engine import Engine, Events

    engine = Engine(nothing_processed)
    engine.add_event_handler(Events.ITERATION_STARTED, nothing_handled)
    engine.add_event_handler(Events.ITERATION_COMPLETED, nothing_handled)
    data = [None] * batches
    with Cost.measured(batches) as cost:
        engine.run(data, max_epochs=1)
    return cost


IGNITE = "Ignite, two empty handlers, nothing recorded"
INTERLOCK = "interlock, two hooks, five transitions recorded durably"


def contenders() -> dict[str, Callable[[int], Cost]]:
    """Those that are installed here, by name."""
    peers = {IGNITE: ignite} if installed("ignite", "Ignite") else {}
    return {**peers, INTERLOCK: interlock}


if __name__ == "__main__":
    options = arguments(__doc__, batches=50_000, rounds=21).parse_args()
    chosen = {name: partial(run, options.batches) for name, run in contenders().items()}
    report(compared(alternate(chosen, options.rounds), IGNITE), options.json)
