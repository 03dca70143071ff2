"""What a training with everything on takes beside its loop: the journal's thread and the shipper, of a processor.

A network of some 4 ms a step is trained for a minute, delivered to a local MLflow store. What each takes is looked at
over the last 25 seconds, when MLflow is imported and the first 10,000 values, which are all delivered, are gone. The
processes that make reports, as seldom as they are dear, are not in it: the first begins after a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping

import psutil
import torch
from measuring import Figure, Row, arguments, keep_memory, report
from torch import nn
from training import network

from orchestrator import Callback, MLflow, Trainer

_LOOKED_AT = 25 / 60
LOOP, JOURNAL, SHIPPER = "the loop's thread", "the journal's thread", "the shipper"


class Looking(Callback):
    """Looks at the processor time of threads and children after a while, and at the end."""

    def __init__(self, seconds: float) -> None:
        self._looks: list[tuple[float, int, dict[str, float]]] = []
        self._lasts = seconds * _LOOKED_AT
        self._next = time.perf_counter() + seconds - self._lasts
        self.found: dict[str, float] = {}

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        if time.perf_counter() < self._next:
            return
        self._looks.append((time.perf_counter(), self.trainer.updates, spent()))
        self._next += self._lasts
        if len(self._looks) == 2:
            (began, first, before), (ended, last, after) = self._looks
            taken = ended - began
            self.found = {name: (after[name] - before[name]) / taken * 100 for name in after}
            self.found["step"] = taken / (last - first) * 1e3
            self.trainer.stop("looked at")


def spent() -> dict[str, float]:
    """Seconds of processor time so far."""
    process, main = psutil.Process(), threading.main_thread().native_id
    journal = next(thread.native_id for thread in threading.enumerate() if thread.name == "interlock-journal")
    threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    times = [child.cpu_times() for child in process.children()]
    return {
        LOOP: threads[main],
        JOURNAL: threads[journal],
        SHIPPER: sum(one.user + one.system for one in times),
    }


def look(seconds: float, width: int, size: int) -> dict[str, float]:
    """Percent of a processor, by name, and how long a step took, in ms."""
    model, looking = network(width, False), Looking(seconds)
    data = [(torch.randn(size, 64), torch.randint(10, (size,))) for _ in range(64)] * 1000
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):  # MLflow puts mlruns/ where it is
        Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), data, epochs=100,
            callbacks=[looking], log=None, track=MLflow(f"sqlite:///{root}/mlflow.db", patience_s=0.0),
            checkpoint=None, root=root,
        ).fit()  # fmt: skip
        for child in psutil.Process().children():
            child.wait()
    return looking.found


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5, seconds=60, width=4096, size=128)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    rounds = [look(options.seconds, options.width, options.size) for _ in range(options.rounds)]
    rows = [Row("a step", Figure.of([one["step"] for one in rounds]), "ms")]
    for name in (LOOP, JOURNAL, SHIPPER):
        rows.append(Row(name, Figure.of([one[name] for one in rounds]), "% of a processor"))
    report(rows, options.json)
