"""Attempt: the files and processes of a run while one process works on it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transitions

from orchestrator.callbacks.checkpointing import best_of, kept
from orchestrator.configuration import Settings
from orchestrator.durability import Durability
from orchestrator.loop import Asked
from orchestrator.requests import HaltRequest
from orchestrator.snapshot.info import CheckpointInfo, not_superseded, readable
from orchestrator.snapshot.storage import (
    checkpoint_name,
    clean_leftovers,
    remove_checkpoint,
)
from orchestrator.snapshot.writer import CheckpointWriter, SaveHandle
from orchestrator.warning import warn
from orchestrator.work import BatchWork, Place, TrainingWork
from states.errors import InterlockError
from states.table import ARCS, State, Trigger
from tracking.frames import TO_LOSS
from tracking.journal import Journal, JournalError, open_attempt
from tracking.masking import mask_text
from tracking.outbox import read_outbox
from tracking.own_artifacts import clean_drafts
from tracking.recorder import FORWARDS, Line
from tracking.rows import AttemptStart, CheckpointRow, Outcome, Parent
from tracking.runs import Lease, RunFolder, create_run
from tracking.shipper import start_shipper

if TYPE_CHECKING:
    from orchestrator.recovery import Plan

__all__ = ["Attempt", "manifest_of", "opened_here"]

_DEST = [arc.dest for arc in ARCS]
_CLOSES_BATCH = [arc.trigger is Trigger.END_BATCH for arc in ARCS]
_CLOSES_EPOCH = [arc.trigger is Trigger.END_EPOCH for arc in ARCS]
_LOOKS_NS = 100_000_000  # between two looks at the files and the time


_opened: set[Path] = set()


def opened_here() -> frozenset[Path]:
    """The folders of the runs that this process has worked on."""
    return frozenset(_opened)


class Attempt:
    """One process's work on a run: holds the lease, writes the journal and the checkpoints."""

    def __init__(
        self,
        run: RunFolder,
        lease: Lease,
        settings: Settings,
        plan: Plan,
        scopes: Sequence[str],
        work: TrainingWork,
        asked: Asked,
    ) -> None:
        self.run = run
        self.closed = False
        self._begins_in = State.IDLE if plan.checkpoint is None else State.HALTED
        self._lease = lease
        self._settings = settings
        self._work = work
        self._asked = asked
        self._validation_scopes = {scope: number for number, scope in enumerate(scopes)}
        overridden = plan.checkpoint.overridden if plan.checkpoint is not None else ()
        phases = [*(phase.name for phase in settings.phases), ""]
        self._no_phase = len(phases) - 1
        self._recorder, self._journal = open_attempt(
            run, lease, _start(settings, plan, work.stream.length), list(scopes), phases
        )
        self._put = self._journal.values.put
        self._line = self._recorder.line(0)
        self._work.noted = self._line.end_frame
        now = self._recorder.now()
        self._deadline = None if settings.max_time is None else now + int(settings.max_time * 1e9)
        self._look_at = now - self._recorder.offset
        self.number: int = self._journal.attempt
        try:
            with Journal.open(run) as journal:
                self._positions = {attempt.attempt: attempt.position for attempt in journal.attempts()}
            if self._journal.notice:
                warn(self._journal.notice)
            for line in overridden:
                self.say(f"overridden: {line}")
            clean_leftovers(run.checkpoints)
            clean_drafts(run)
            self._checkpoints = CheckpointWriter(run.checkpoints, before_rename=self._journal.sync)
            self._saved: tuple[int, SaveHandle] | None = None
            self._durability: Durability | None = None
            checkpoint, track = settings.checkpoint, settings.track
            if track is not None and checkpoint is not None and checkpoint.durable == "remote":
                self._durability = Durability(run, track.upload, self._tell)
            self._shipper: subprocess.Popen[bytes] | None = None
            if settings.track is not None:
                self._shipper = start_shipper(run, settings.track)
        except BaseException:
            self._journal.close()  # its thread would outlive the lease
            raise

    @classmethod
    def open(
        cls,
        plan: Plan,
        settings: Settings,
        scopes: Sequence[str],
        work: TrainingWork,
        asked: Asked,
        parent: Parent | None = None,
    ) -> Attempt:
        """Make or take the run's folder, lease and journal; a new run is linked to `parent`.

        What is recorded is `work`. `asked` is told when `trouble` is to be looked at.
        """
        fresh = plan.run is None
        run = create_run(settings.root, settings.name, parent=parent) if plan.run is None else plan.run
        lease = plan.lease if plan.lease is not None else Lease.acquire(run)
        try:
            if fresh or not run.command.exists():  # one that was fetched has come without
                _keep_command(run)
            attempt = cls(run, lease, settings, plan, scopes, work, asked)
            _opened.add(run.path.resolve())
            return attempt
        except BaseException:
            lease.release()
            raise

    @property
    def seq(self) -> int:
        """The number of the last journaled transition of the training; 0 before this attempt's first."""
        return self._line.seq if self._line.arc >= 0 else 0

    @property
    def state(self) -> State:
        """The last journaled state of the training."""
        return _DEST[self._line.arc] if self._line.arc >= 0 else self._begins_in

    def trouble(self) -> HaltRequest | None:
        """A reason to halt that lies with the files, or, once, with the time that this attempt was given."""
        failure = self._journal.failure or self._checkpoints.failure
        if failure is not None:
            return HaltRequest(f"the run's folder cannot be written: {failure}", save=False, error=failure)
        if self._deadline is not None and self._recorder.now() >= self._deadline:
            self._deadline = None
            return HaltRequest(f"max_time of {self._settings.max_time:g} s is up", error=SystemExit(75))
        return None

    def spent(self) -> dict[Trigger, int]:
        """Nanoseconds of the newest batches of the training by trigger; from any thread."""
        found: dict[Trigger, int] = {}
        for arc, ns in self._recorder.spent(self._line.scope).items():
            trigger = ARCS[arc].trigger
            found[trigger] = found.get(trigger, 0) + ns
        return found

    def idle_s(self) -> float:
        """Seconds since the last transition of the training was complete; from any thread."""
        try:
            return (self._recorder.now() - self._line.time_ns) / 1e9
        except ValueError:  # it was closed
            return 0.0

    # -- writing down ----------------------------------------------------------------------------

    def record(self, arc: int) -> None:
        """Write down a transition of the training, and at the end of batch or epoch its metrics."""
        work = self._work
        place, note = work.place, work.note
        now = self._line.lap(arc, work.phase, place.epoch, place.batch, work.loss, note)
        if note:
            work.note = ""
        if _CLOSES_BATCH[arc]:
            self._close_batch(now - self._recorder.offset)
        elif _CLOSES_EPOCH[arc]:
            by_epoch = self._settings.binding["validate_every"] is None
            self._metrics(place.epoch, -1, place.epoch, work.history[-1], work.validated, now, by_epoch)

    def writer(self, arc: int) -> Callable[[], None]:
        """What writes `arc`, one of a batch, down as `record` does, but sooner."""
        record = partial(self.record, arc)
        if len(self._settings.phases) > 1:
            return record
        return self._hurried(arc, self._line, self._work, 0, record, self._close_batch)

    def _hurried(
        self,
        arc: int,
        line: Line,
        work: BatchWork,
        phase: int,
        record: Callable[[], None],
        close: Callable[[int], None],
    ) -> Callable[[], None]:
        """What does `record` where the frame at hand can be gone on with, and `close` at the end of a batch."""
        if ARCS[arc].trigger is Trigger.FETCH:
            return line.beginner(arc, phase, work.place, record)

        recorder, read = self._recorder, time.perf_counter_ns
        words, losses, of_arc = recorder.words, recorder.losses, recorder.stamp(arc)

        def write() -> None:
            at = line.at
            if at >= line.end:
                record()
                return
            words[at] = read() + of_arc
            line.at = at + 1

        def write_loss() -> None:
            at = line.at
            if at >= line.end or not line.free:
                record()
                return
            losses[line.first + TO_LOSS] = work.loss
            line.free = False
            words[at] = read() + of_arc
            line.at = at + 1

        def write_last() -> None:
            at = line.at
            if at >= line.end:
                record()
                return
            clock = read()
            words[at] = clock + of_arc
            line.at = at + 1
            close(clock)

        if arc in FORWARDS:
            return write_loss
        return write_last if _CLOSES_BATCH[arc] else write

    def _close_batch(self, clock: int) -> None:
        """A batch is written down: fold its values into the epoch's. `clock` is what `time.perf_counter_ns` read."""
        work = self._work
        work.close_batch()
        values, place = work.metrics, work.place
        if work.validated:
            now = clock + self._recorder.offset
            self._metrics(place.epoch, place.batch, place.batches, values, work.validated, now)
        elif values:
            now = clock + self._recorder.offset
            self._put(self._line.seq, "train", place.epoch, place.batch, place.batches, now, values)
        if clock >= self._look_at:
            self._look(clock)

    def _look(self, clock: int) -> None:
        if clock >= self._look_at:
            self._look_at = clock + _LOOKS_NS
            self._asked.open = True

    def restart_clock(self) -> None:
        """What has passed since the last transition belongs to none."""
        self._line.restart()

    def _metrics(
        self,
        epoch: int,
        batch: int,
        step: int,
        values: Mapping[str, float],
        validated: Mapping[str, float],
        now: int,
        with_validation: bool = True,
    ) -> None:
        """Journal `values`, those of validation under scopes of their own."""
        own = {k: v for k, v in values.items() if k not in validated} if validated else values
        self._journal.metrics("train", epoch, batch, step, own, now, seq=self.seq)
        if not (validated and with_validation and validated.keys() & values.keys()):
            return
        for scope in self._validation_scopes:
            prefix = scope.removeprefix("validation/") + "/"
            found = {
                k.removeprefix(prefix): values[k] for k in validated if k.startswith(prefix) and k in values
            }
            if found:
                self._journal.metrics(scope, epoch, batch, step, found, now, seq=self.seq)

    def begin_validation(self, name: str, work: BatchWork) -> Callable[[int], Callable[[], None]]:
        """A validation pass begins; its transitions are timed by themselves, being part of one of the training.

        Returns what gives, for an arc, what writes it down as `record_validation` does.
        """
        line = self._validation_line(name)
        line.restart()

        def writer(arc: int) -> Callable[[], None]:
            record = partial(self.record_validation, arc, name, work)
            return self._hurried(arc, line, work, self._no_phase, record, self._look)

        return writer

    def record_validation(self, arc: int, name: str, work: BatchWork) -> None:
        """Write down a transition of a validation pass."""
        place = work.place
        now = self._validation_line(name).lap(arc, self._no_phase, place.epoch, place.batch, work.loss)
        self._look(now - self._recorder.offset)

    def _validation_line(self, name: str) -> Line:
        return self._recorder.line(self._validation_scopes[f"validation/{name}"])

    @property
    def last_seq(self) -> int:
        """The number of the last journaled transition, of the training or of a validation."""
        return self._recorder.next_seq - 1

    def loss_arrived(self, seq: int, loss: float) -> None:
        """Fill in the loss of the forward pass that is transition `seq`."""
        self._journal.late_loss(seq, loss)

    def values_arrived(
        self, epoch: int, batch: int, step: int, values: Mapping[str, float], time_ns: int, seq: int
    ) -> None:
        """Write down values of a batch whose end, transition `seq`, was written down before they were known."""
        self._journal.metrics("train", epoch, batch, step, values, time_ns, seq=seq)

    def catch_up(self) -> None:
        """See whether a transition was journaled though an exception struck before `record` returned."""
        self._recorder.catch_up()

    def save(
        self,
        tree: dict[str, Any],
        state: State,
        place: Place,
        purpose: str,
        metrics: Mapping[str, float],
        data: Mapping[str, Any],
        *,
        left_alone: Collection[str] = (),
    ) -> SaveHandle:
        """Begin to write a checkpoint of `tree`; live tensors may change as soon as this returns.

        `left_alone`: those of these kinds only once `finish_copy` has.
        `data` are the fingerprints of the data. A second save at one boundary is the first one.
        """
        if self._saved is not None and self._saved[0] == self.seq:
            return self._saved[1]
        began = time.time_ns()
        name = checkpoint_name(self.seq, self.number, place.epoch, place.batch, state)
        seq, epoch, batch = self.seq, place.epoch, place.batch
        manifest = manifest_of(
            self.run, seq, self.number, place, state, purpose, metrics, self._settings, data, began
        )

        def durable(path: Path) -> None:
            size = sum(file.stat().st_size for file in path.iterdir())
            best = self.best()
            self._journal.checkpoint(
                CheckpointRow(
                    name=name,
                    seq=seq,
                    epoch=epoch,
                    batch=batch,
                    state=state,
                    size_bytes=size,
                    time_ns=time.time_ns(),
                    duration_ns=time.time_ns() - began,
                    best=best is not None and best.name == name,
                    metrics=dict(metrics),
                )
            )
            self._retain()

        handle = self._checkpoints.submit(name, tree, manifest, durable, left_alone=left_alone)
        self._saved = (seq, handle)
        return handle

    def finish_copy(self) -> bool:
        """Wait until the newest checkpoint is copied; False where it could not be made, and another has to be."""
        error = self._checkpoints.finish_copy()
        if error is not None:
            self._saved = None
            self._tell(str(error))
        return error is None

    def _retain(self) -> None:
        """Remove the checkpoints that the settings do not keep; only after a newer one is safe."""
        settings = self._settings.checkpoint
        if settings is None:
            return
        infos = self.checkpoints()
        keep = kept(infos, settings)
        doomed = [info for info in infos if info.name not in keep]
        for info in doomed if self._durability is None else self._durability.removable(doomed):
            remove_checkpoint(info.path)
            self._journal.checkpoint_removed(info.name)

    def _tell(self, message: str) -> None:
        """Say it at once, and keep it in the journal; also from the thread that writes checkpoints."""
        self.warn(message)
        warn(message)

    def checkpoints(self) -> list[CheckpointInfo]:
        """The run's checkpoints on disk that are not superseded, newest first."""
        return not_superseded(readable(self.run.checkpoints), self._positions)

    def best(self) -> CheckpointInfo | None:
        """The best of them by the metric that is watched; None where none is."""
        settings = self._settings.checkpoint
        return best_of(self.checkpoints(), settings.best) if settings is not None else None

    def sync(self) -> None:
        """Wait until every transition so far is in the journal."""
        self._journal.sync()

    def last_save(self) -> SaveHandle | None:
        """The checkpoint of where the training stands, or of where it halted; None if there is none."""
        if self._saved is None or self._saved[0] not in (self.seq, self.seq - (self.state is State.HALTED)):
            return None
        return self._saved[1]

    def wait_for_save(self) -> Exception | None:
        """Wait for the newest checkpoint to be on disk; what went wrong, if anything did."""
        if self._saved is not None:
            try:
                self._saved[1].wait()
            except Exception as error:
                return error
        return None

    def way_back(self, place: Place) -> str:
        """Where a resume would go back to, and how many batches it would do again."""
        self.wait_for_save()
        newest = next(iter(self.checkpoints()), None)
        if newest is None:
            return "there is no checkpoint to resume from"
        again = place.batches - newest.batches
        return f"resume goes back to {newest.name} and does {again} batch{'es' * (again != 1)} again"

    def warn(self, message: str) -> None:
        """Keep a warning in the journal."""
        self._journal.log("WARNING", message)

    def say(self, message: str) -> None:
        """Keep a message in the journal."""
        self._journal.log("INFO", message)

    def close(self, outcome: Outcome, reason: str, error: BaseException | None) -> None:
        """Wait for what is being written, write the attempt's end, and let go of the run."""
        if self.closed:
            return
        self.closed = True
        try:
            try:
                self._checkpoints.close()
            except Exception as failure:
                warn(f"the last checkpoint could not be written: {failure}")
            exception = "" if error is None or outcome != "failed" else f"{type(error).__name__}: {error}"
            try:
                self._journal.end(outcome, reason, exception)
            except JournalError as failure:  # settled later, from the flight recorder
                warn(f"the end of this attempt could not be journaled: {failure}")
            finally:
                self._journal.close()
        finally:
            self._lease.release()
        if self._shipper is not None:
            self._tell_of_trouble()

    def _tell_of_trouble(self) -> None:
        """Say once if, at the attempt's end, the run cannot be delivered."""
        with contextlib.suppress(InterlockError):
            if trouble := read_outbox(self.run.outbox).trouble:
                warn(
                    f"{self.run.id}: training is not affected, but tracking has trouble: {mask_text(trouble)}. "
                    f"`interlock show {self.run.id}` says what is left to deliver",
                    RuntimeWarning,
                )


def manifest_of(
    run: RunFolder,
    seq: int,
    attempt: int,
    place: Place,
    state: State,
    purpose: str,
    metrics: Mapping[str, float],
    settings: Settings,
    data: Mapping[str, Any],
    created_ns: int,
) -> dict[str, Any]:
    """What a checkpoint says of itself; `data` are the fingerprints of the data."""
    return {
        "run": run.id,
        "seq": seq,
        "attempt": attempt,
        "epoch": place.epoch,
        "batch": place.batch,
        "batches": place.batches,
        "state": state.value,
        "purpose": purpose,
        "metrics": dict(metrics),
        "binding": dict(settings.binding),
        **data,
        "created_ns": created_ns,
    }


def _start(settings: Settings, plan: Plan, batches_per_epoch: int | None) -> AttemptStart:
    process = psutil.Process()
    params = dict(settings.params)
    if batches_per_epoch is not None:
        params["batches_per_epoch"] = batches_per_epoch
    if plan.checkpoint is not None and plan.checkpoint.overridden:
        params["override"] = "; ".join(plan.checkpoint.overridden)
    checkpoint = plan.checkpoint
    return AttemptStart(
        position=None if checkpoint is None else checkpoint.info.seq,
        started_ns=time.time_ns(),
        pid=process.pid,
        host=socket.gethostname(),
        process_started=process.create_time(),
        command=_command(),
        params=params,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transitions": transitions.__version__,
        },
        device=str(settings.device),
    )


def _command() -> dict[str, Any]:
    return {"argv": list(sys.orig_argv), "executable": sys.executable, "cwd": os.getcwd()}


def _keep_command(run: RunFolder) -> None:
    """The command that started the run, for `interlock resume`; unmasked, so for its owner's eyes only."""
    file = os.open(run.command, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(file, "w") as stream:
        json.dump(_command(), stream, indent=1)
