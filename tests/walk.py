"""Walks the table as a training loop would, recording every step: what tests of the journal are fed with."""

import math
import os
import socket
from collections.abc import Callable

from states.table import ARCS, State, Trigger
from tracking.journal import AttemptStart, JournalWriter, Transition, open_attempt
from tracking.recorder import Recorder
from tracking.runs import Lease, RunFolder

SCOPES = ["train", "validation/val"]
PHASES = ["", "generator"]
CODES = {(arc.trigger, arc.source, arc.dest): code for code, arc in enumerate(ARCS)}
BATCH = (Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH)


def put(
    recorder: Recorder,
    arc: int,
    scope: int,
    phase: int,
    epoch: int,
    batch: int,
    ns: int,
    duration_ns: int,
    loss: float,
    note: str = "",
) -> int:
    """Write a transition down, complete `ns` after the recorder's beginning; its seq."""
    time_ns = recorder.since_ns + ns
    return recorder.line(scope).record(arc, phase, epoch, batch, time_ns, duration_ns, loss, note)


class Walk:
    """One scope's machine. Times follow from the seq, so that what was recorded can be foretold."""

    def __init__(self, recorder: Recorder, state: State = State.IDLE, scope: int = 0):
        self.recorder = recorder
        self.state = state
        self.scope = scope
        self.epoch = self.batch = -1
        self.recorded: list[Transition] = []
        self.after: Callable[[int], None] = lambda seq: None

    def go(
        self,
        trigger: Trigger,
        dest: State | None = None,
        *,
        loss: float = math.nan,
        note: str = "",
        phase: int = 0,
    ) -> int:
        if dest is None:
            dest = next(arc.dest for arc in ARCS if (arc.trigger, arc.source) == (trigger, self.state))
        if trigger is Trigger.BEGIN_EPOCH:
            self.epoch, self.batch = self.epoch + 1, -1
        elif trigger is Trigger.FETCH:
            self.batch += 1
        source, self.state = self.state, dest
        ns = self.recorder.next_seq * 1_000_003
        code = CODES[trigger, source, dest]
        seq = put(self.recorder, code, self.scope, phase, self.epoch, self.batch, ns, 1_000_003, loss, note)
        # fmt: off
        self.recorded.append(
            Transition(seq, self.recorder.attempt, SCOPES[self.scope], self.epoch, self.batch, PHASES[phase],
                       trigger, source, dest, self.recorder.since_ns + ns, 1_000_003,
                       None if math.isnan(loss) and trigger is not Trigger.FORWARD else loss, note)
        )
        # fmt: on
        self.after(seq)
        return seq

    def epochs(self, epochs: int = 1, batches: int = 3) -> "Walk":
        for _ in range(epochs):
            self.go(Trigger.BEGIN_EPOCH)
            for _ in range(batches):
                for trigger in BATCH:
                    loss = (self.recorder.next_seq / 7) if trigger is Trigger.FORWARD else math.nan
                    self.go(trigger, loss=loss)
            self.go(Trigger.END_EPOCH)
        return self


def start(position: int | None = None) -> AttemptStart:
    return AttemptStart(
        position=position,
        started_ns=1_600_000_000_000_000_000,
        pid=os.getpid(),
        host=socket.gethostname(),
        process_started=1_600_000_000.5,
        command=["train.py", "--epochs", "3"],
        params={"lr": 0.1},
        versions={"python": "3.11"},
        device="cpu",
    )


def begin(
    run: RunFolder, lease: Lease, position: int | None = None, capacity: int = 16384
) -> tuple[Recorder, JournalWriter]:
    return open_attempt(run, lease, start(position), SCOPES, PHASES, capacity=capacity)
