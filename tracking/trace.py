"""A run as a trace for Perfetto or chrome://tracing (Trace Event Format, JSON), written as it is read.

Attempts are processes, the training and each validation are their threads. Transitions are complete events (`X`),
epochs enclose them; losses are counters (`C`); saves, halts, resumes, skipped steps and what was done again are
instants (`i`). https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU defines the format.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from states.table import State, Trigger
from tracking.journal import TRAIN, Attempt, Checkpoint, Journal, Transition
from tracking.runs import RunFolder

__all__ = ["write_trace"]

_MOST_THREADS = 1000  # of an attempt; viewers take the thread that has its process's number for the main one


def write_trace(run: RunFolder, file: Path, epochs: range | None = None) -> int:
    """Write the trace of `run`, of all or some `epochs`; how many events it has.

    Compressed where `file` ends in .gz. Takes little memory, however long the run. `file` appears whole or not at
    all. Raises JournalError, OSError.
    """
    draft = file.with_name(f"{file.name}.part")
    try:
        with Journal.open(run) as journal, _opened(draft, compressed=file.suffix == ".gz") as stream:
            written = 0
            stream.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for written, event in enumerate(_Events(journal, epochs).all(), 1):
                stream.write(("\n" if written == 1 else ",\n") + event)
            about = {"run": run.id, "epochs": "all" if epochs is None else [epochs.start, epochs.stop - 1]}
            stream.write(f'\n], "otherData": {json.dumps(about)}}}\n')
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return written


def _opened(file: Path, *, compressed: bool) -> TextIO:
    if compressed:
        return gzip.open(file, "wt", compresslevel=4, encoding="utf-8")
    return file.open("w", encoding="utf-8")


class _Events:
    """The events of a run, one JSON object each, nearly in the order of time."""

    def __init__(self, journal: Journal, epochs: range | None) -> None:
        self._journal = journal
        self._epochs = epochs
        self._attempts = journal.attempts()
        self._base = min((attempt.started_ns for attempt in self._attempts), default=0)
        self._threads: dict[tuple[int, str], int] = {}
        self._epoch: dict[int, tuple[int, int]] = {}
        """For each attempt the epoch that is open, and when it began."""

    def all(self) -> Iterator[str]:
        for attempt in self._attempts:
            yield from _process(attempt)
        newest: dict[int, int] = {}
        for found in self._transitions():
            if (found.attempt, found.scope) not in self._threads:
                yield from self._thread(found)
            newest[found.attempt] = found.time_ns
            yield from self._transition(found)
        for number, end in newest.items():
            yield from self._close(number, end)
        for checkpoint in self._journal.checkpoints(include_removed=True, include_superseded=True):
            if self._epochs is None or checkpoint.epoch in self._epochs:
                yield self._save(checkpoint)

    def _transitions(self) -> Iterator[Transition]:
        if self._epochs is None:
            return self._journal.transitions(include_superseded=True, live=True)
        read = self._journal.transitions
        return chain.from_iterable(
            read(epoch=epoch, include_superseded=True, live=True) for epoch in self._epochs
        )

    def _thread(self, found: Transition) -> Iterator[str]:
        pid, training = found.attempt, found.scope == TRAIN
        place = 0 if training else 1 + sum(a == pid and scope != TRAIN for a, scope in self._threads)
        tid = self._threads[pid, found.scope] = pid * _MOST_THREADS + place if place else pid
        name = "training" if training else found.scope.replace("/", " ", 1)
        yield _metadata(pid, tid, "thread_name", name=name)
        yield _metadata(pid, tid, "thread_sort_index", sort_index=place)

    def _transition(self, found: Transition) -> Iterator[str]:
        """The event of a transition, with what goes with it."""
        pid, tid = found.attempt, self._threads[found.attempt, found.scope]
        begin, trigger = found.time_ns - found.duration_ns, found.trigger
        args: dict[str, Any] = {"epoch": found.epoch, "batch": found.batch, "seq": found.seq}
        args["to"] = found.dest.value
        if found.loss is not None:
            args["loss"] = found.loss if math.isfinite(found.loss) else str(found.loss)
        if found.phase:
            args["phase"] = found.phase
        if found.note:
            args["note"] = found.note
        category = "superseded" if found.superseded else "train" if found.scope == TRAIN else "validation"
        if found.scope == TRAIN:
            if trigger in (Trigger.BEGIN_EPOCH, Trigger.RESUME):
                yield from self._close(pid, begin)
                if found.epoch >= 0 and found.dest is not State.EPOCH_END:
                    self._epoch[pid] = (found.epoch, begin)
            if trigger in (Trigger.HALT, Trigger.FINISH):
                yield from self._close(pid, begin)
        yield (
            f'{{"name":"{trigger.value}","cat":"{category}","ph":"X","ts":{self._us(begin)},'
            f'"dur":{_us(found.duration_ns)},"pid":{pid},"tid":{tid},"args":{json.dumps(args)}}}'
        )
        if found.scope == TRAIN:
            if trigger in (Trigger.HALT, Trigger.RESUME) or "skipped" in found.note:
                said = trigger.value if trigger is not Trigger.STEP else "skipped"
                yield self._instant(said, found.time_ns, pid, tid, args)
            if found.loss is not None and math.isfinite(found.loss):
                name = json.dumps(f"loss {found.phase}".strip())
                yield (
                    f'{{"name":{name},"cat":"loss","ph":"C","ts":{self._us(found.time_ns)},"pid":{pid},'
                    f'"args":{{"value":{found.loss!r}}}}}'
                )
            if trigger is Trigger.END_EPOCH:
                yield from self._close(pid, found.time_ns)

    def _close(self, attempt: int, end: int) -> Iterator[str]:
        """The event of the epoch that was open, which its transitions lie within."""
        open_ = self._epoch.pop(attempt, None)
        if open_ is not None and end > open_[1]:
            epoch, begin = open_
            yield (
                f'{{"name":"epoch {epoch}","cat":"epoch","ph":"X","ts":{self._us(begin)},"dur":{_us(end - begin)},'
                f'"pid":{attempt},"tid":{attempt},"args":{{"epoch":{epoch}}}}}'
            )

    def _save(self, checkpoint: Checkpoint) -> str:
        args = {
            "checkpoint": checkpoint.name,
            "epoch": checkpoint.epoch,
            "batch": checkpoint.batch,
            "bytes": checkpoint.size_bytes,
            "best": checkpoint.best,
        }
        return self._instant("saved", checkpoint.time_ns, checkpoint.attempt, checkpoint.attempt, args)

    def _instant(self, name: str, time_ns: int, pid: int, tid: int, args: dict[str, Any]) -> str:
        return (
            f'{{"name":"{name}","cat":"event","ph":"i","s":"p","ts":{self._us(time_ns)},"pid":{pid},"tid":{tid},'
            f'"args":{json.dumps(args)}}}'
        )

    def _us(self, time_ns: int) -> str:
        return _us(time_ns - self._base)


def _process(attempt: Attempt) -> Iterator[str]:
    outcome = attempt.outcome or "no end yet"
    name = f"attempt {attempt.attempt} ({outcome}; process {attempt.pid} on {attempt.host})"
    yield _metadata(attempt.attempt, 0, "process_name", name=name)
    yield _metadata(attempt.attempt, 0, "process_sort_index", sort_index=attempt.attempt)


def _metadata(pid: int, tid: int, what: str, **args: Any) -> str:
    return json.dumps({"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args})


def _us(nanoseconds: int) -> str:
    """Microseconds, exactly: rounded ends would overlap."""
    sign, whole = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    return f"{sign}{whole // 1000}.{whole % 1000:03}"
