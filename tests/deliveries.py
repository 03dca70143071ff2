"""Trainings that write a journal and nothing else, for tests of the delivery; also run as a child process."""

import math
import os
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import tracking
from mlflow_server import RemoteRun
from states.table import State, Trigger
from tracking.journal import CheckpointRow, Journal, Metric, Outcome
from tracking.outbox import metric_name
from tracking.runs import Lease, RunFolder
from walk import BATCH, Walk, begin

BATCHES = 5
"""Batches an epoch."""

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(tracking.__file__).parent.parent), str(Path(__file__).parent)]),
}


class Training:
    """One attempt: holds the lease, and writes down batches whose metrics follow from their number."""

    def __init__(self, run: RunFolder, position: int | None = None, done: int = 0):
        """`done` batches were done at the transition `position` that is gone back to."""
        self.run = run
        self.done = done
        self.lease = Lease.acquire(run)
        self.recorder, self.writer = begin(run, self.lease, position)
        self.walk = Walk(self.recorder)
        if position is not None:
            self.walk.state = State.HALTED
            self.walk.epoch, self.walk.batch = divmod(done - 1, BATCHES)
            self.walk.go(Trigger.RESUME, State.BATCH_END)

    def batch(self, pause_s: float = 0.0) -> int:
        """One batch, with the beginning and the end of its epoch where it has them; its `end_batch`'s seq."""
        if self.done % BATCHES == 0:
            self._end_epoch()
            self.walk.go(Trigger.BEGIN_EPOCH)
        for trigger in BATCH:
            seq = self.walk.go(trigger, loss=1 / (self.done + 1) if trigger is Trigger.FORWARD else math.nan)
        self.done += 1
        values = {"loss": 1 / self.done, "acc@1": math.sqrt(self.done)}
        now = time.time_ns()
        self.writer.metrics("train", self.walk.epoch, self.walk.batch, self.done, values, now, seq=seq)
        time.sleep(pause_s)
        return seq

    def _end_epoch(self) -> None:
        if self.walk.state is State.BATCH_END:
            seq, epoch = self.walk.go(Trigger.END_EPOCH), self.walk.epoch
            now = time.time_ns()
            self.writer.metrics("train", epoch, -1, epoch, {"loss": 1 / self.done, "lr": 0.1}, now, seq=seq)
            self.writer.metrics("validation/val", epoch, -1, epoch, {"loss": 2 / self.done}, now, seq=seq)

    def checkpoint(self, *, best: bool = False) -> str:
        """Write a checkpoint; its name."""
        name = f"{self.recorder.next_seq - 1:08}-{self.recorder.attempt}-{self.walk.state.value.lower()}"
        folder = self.run.checkpoints / name
        folder.mkdir()
        contents = {
            "manifest.json": b"{}",
            "model.safetensors": os.urandom(3000),
            "state.json": name.encode(),
        }
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        size = sum(map(len, contents.values()))
        row = CheckpointRow(
            name,
            self.recorder.next_seq - 1,
            self.walk.epoch,
            self.walk.batch,
            self.walk.state,
            size,
            time.time_ns(),
        )
        self.writer.checkpoint(row if not best else CheckpointRow(**{**vars(row), "best": True}))
        return name

    def end(self, outcome: Outcome = "done", reason: str = "", exception: str = "") -> None:
        """End the attempt as a trainer would."""
        if outcome == "done":
            self._end_epoch()
            self.walk.go(Trigger.FINISH)
        else:
            self.walk.go(Trigger.HALT, note=reason)
        self.writer.end(outcome, reason, exception)
        self.writer.close()
        self.lease.release()


def train_in_child(run: RunFolder, body: str) -> "subprocess.Popen[bytes]":
    """A process in which `training` is a new attempt of `run`, and `body` is done with it."""
    script = f"""
import os, pathlib, random, signal, sys, time
from deliveries import *
from tracking.journal import *; from tracking.mlflow_delivery import MLflow; from tracking.runs import *
from tracking.shipper import *
run = RunFolder(pathlib.Path({str(run.path)!r}))
{body}
"""
    return subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT)


def go_back(run: RunFolder, chance: random.Random) -> tuple[int, int, int]:
    """Somewhere to go on from, as (position, batches done there), and how many were done by the attempt that died.

    Like a checkpoint it stands after a batch whose values are in the journal; those of the last died with the process.
    """
    with Journal.open(run) as journal:
        ends = [row.seq for row in journal.transitions(live=True) if row.trigger is Trigger.END_BATCH]
        kept = sum(row.batch >= 0 for row in journal.metrics(scope="train", key="acc@1"))
    done = chance.randrange(1, kept + 1)
    return ends[done - 1], done, len(ends)


def name_of(row: Metric) -> str:
    """What MLflow calls a metric of the journal."""
    return metric_name(row.scope, row.batch, row.key).replace("@", "_")


def expected_points(run: RunFolder) -> dict[tuple[str, int], float]:
    """What the server should have: {(key, step): value}."""
    with Journal.open(run) as journal:
        return {(name_of(row), row.step): row.value for row in journal.metrics()}


def shown(value: float) -> float | None:
    """How an SQL store keeps a value (NaN: see `RemoteRun`)."""
    return None if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def assert_once(run: RunFolder, remote: RemoteRun) -> None:
    """Each point of the journal is at the server, once, with its value and the time of one of its rows."""
    found = [(key, step) for key, step, _, _ in remote.points]
    assert len(found) == len(set(found)), "points are there twice"
    expected = {point: shown(value) for point, value in expected_points(run).items()}
    assert {(key, step): value for key, step, value, _ in remote.points} == expected
    with Journal.open(run) as journal:
        times = {
            (name_of(row), row.step, row.time_ns // 1_000_000)
            for row in journal.metrics(include_superseded=True)
        }
    assert {(key, step, time_ms) for key, step, _, time_ms in remote.points} <= times


def assert_each_once(run: RunFolder, remote: RemoteRun) -> None:
    """The same where batches may be means, as they are once a slow server, or 10,000 values, has made it so.

    Each value of a batch is then in one point, that of the first step from its own on, which is the mean of its values.
    """
    found = {(key, step): value for key, step, value, _ in remote.points}
    assert len(found) == len(remote.points), "points are there twice"
    windows: dict[tuple[str, int], list[float]] = {}
    steps: dict[str, list[int]] = {}
    for key, step in sorted(found):
        steps.setdefault(key, []).append(step)
    for (key, step), value in expected_points(run).items():
        last = step
        if key.startswith("batch/"):
            at = bisect_left(steps[key], step)
            assert at < len(steps[key]), f"{key} of step {step} is in no point"
            last = steps[key][at]
        windows.setdefault((key, last), []).append(value)
    assert found.keys() == windows.keys()
    for point, within in windows.items():
        assert math.isclose(found[point], sum(within) / len(within), rel_tol=1e-12), point


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for `condition`; fail if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
