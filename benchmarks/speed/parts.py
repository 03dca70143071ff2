"""Where the time of a batch of orchestration goes: the parts of what dispatch.py measures, each in a loop of its own.

"Running" is the loop with nothing written down: choosing the trigger, the lists of hooks and work, changing the state.
"Writing" is what writes each of the five transitions down, called in their order. The journal's thread is the
processor time of a whole run that is not its main thread's. The parts are measured by themselves, and so add up
roughly.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dispatch import nothing, without_work
from measuring import arguments, beside, report

from states.table import ARCS, Arc, State, Trigger

CYCLE = {
    "fetch": Arc(Trigger.FETCH, State.BATCH_END, State.BATCH_START),
    "forward": Arc(Trigger.FORWARD, State.BATCH_START, State.FORWARD),
    "backward": Arc(Trigger.BACKWARD, State.FORWARD, State.BACKWARD),
    "step": Arc(Trigger.STEP, State.BACKWARD, State.STEP),
    "end_batch": Arc(Trigger.END_BATCH, State.STEP, State.BATCH_END),
}


def running(batches: int, root: Path) -> float:
    """Seconds of the loop when nothing is written down."""
    training = without_work(batches, root)._training
    began = time.thread_time()
    training.loop.run(training.requests, nothing, lambda arc: nothing)
    return time.thread_time() - began


def writing(batches: int, root: Path, names: list[str]) -> float:
    """Seconds of writing these transitions of a batch down."""
    trainer = without_work(batches, root)
    training = trainer._training
    assert training.attempt is not None
    place = training.work.place
    writers = [training.attempt.writer(ARCS.index(CYCLE[name])) for name in names]
    began = time.thread_time()
    for place.batch in range(batches):
        for write in writers:
            write()
    spent = time.thread_time() - began
    trainer.close()
    return spent


def journal_thread(batches: int, root: Path) -> float:
    """Seconds of processor time that a run takes beside its main thread."""
    trainer = without_work(batches, root)
    whole, main = time.process_time(), time.thread_time()
    trainer.fit()
    return time.process_time() - whole - (time.thread_time() - main)


def parts() -> dict[str, Callable[[int, Path], float]]:
    """What is measured, by name."""
    names = list(CYCLE)
    found: dict[str, Callable[[int, Path], float]] = {"running": running}
    for at in range(len(names)):
        found[f"writing {', '.join(names[: at + 1])}"] = partial(writing, names=names[: at + 1])
    return {**found, "the journal's thread": journal_thread}


if __name__ == "__main__":
    options = arguments(__doc__, batches=20_000, rounds=7).parse_args()
    found: dict[str, list[float]] = {name: [] for name in parts()}
    for _ in range(options.rounds):
        for name, part in parts().items():
            with tempfile.TemporaryDirectory() as root:
                found[name].append(part(options.batches, Path(root)) / options.batches * 1e6)
    report(beside(found, None, "µs a batch"), options.json)
