"""The callback that turns transitions into log records and keeps the live line going."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

import torch

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from orchestrator.callbacks.logs.notebook import NotebookConsole, in_notebook
from orchestrator.callbacks.logs.progress import Pace, Progress, batches_left
from orchestrator.callbacks.logs.record import Kind, LogRecord, clock, quantity, shown, span
from orchestrator.callbacks.logs.sinks import (
    FileLog,
    FunctionSink,
    PlainConsole,
    Sink,
    live_wanted,
)
from orchestrator.callbacks.watched import Watched, direction_of
from orchestrator.errors import ConfigurationError
from orchestrator.warning import warn
from states.table import State, Trigger
from tracking.forks import forget_in_children

if TYPE_CHECKING:
    from orchestrator.callbacks.logs.live import LiveConsole
    from orchestrator.trainer import Trainer

__all__ = ["Logging", "headline"]

_LONG = 2.0  # seconds of one transition

Level = Literal["minimal", "standard", "verbose"]
Target = Literal["console", "file"] | Callable[[LogRecord], object]


class Logging(Callback):
    """Says what the training does.

    Args:
        level: "minimal": start, end, halts and warnings. "standard": also a row for each epoch, what is said by
            `trainer.say`, and on a terminal a live line with epoch, batch, time left, loss and metrics. "verbose":
            also every batch and every transition.
        every_batches: a line after every so many batches; by default none, with "verbose" each one.
        every_epochs: a row after every so many epochs, and after the last.
        metrics: the names of those to show, in this order, in rows, lines and the live line; by default all
            but those of single parameters.
        to: any of "console", "file" (`console.log` in the run's folder, continued by later attempts) and
            functions that are called with each `LogRecord`.

    Where standard output is no terminal, or `TERM=dumb` or `CI` is set, the console has plain lines only.
    With several ranks, rank 0 speaks; data workers never do. A hook that the settings do not need is not
    registered. "3/10" counts (the third of ten); "epoch 2, batch 5" is a place, counted from 0.

    Raises ConfigurationError for a level or target that there is not, and for numbers below 1.
    """

    def __init__(
        self,
        level: Level = "standard",
        *,
        every_batches: int | None = None,
        every_epochs: int = 1,
        metrics: Sequence[str] | None = None,
        to: Target | Sequence[Target] = ("console", "file"),
    ) -> None:
        if level not in get_args(Level):
            raise ConfigurationError(f"log level is {level!r}; expected one of {', '.join(get_args(Level))}")
        check_whole(f"Logging(every_batches={every_batches!r}): it", every_batches, optional=True)
        check_whole(f"Logging(every_epochs={every_epochs!r}): it", every_epochs)
        if metrics is not None and (isinstance(metrics, str) or not isinstance(metrics, Sequence)):
            raise ConfigurationError(f"Logging(metrics={metrics!r}): expected a list of names, [{metrics!r}]")
        self.level = level
        self.every_batches = 1 if every_batches is None and level == "verbose" else every_batches
        self.every_epochs = every_epochs
        self.metrics = None if metrics is None else tuple(metrics)
        self.to = _targets(to)
        self._sinks: list[Sink] = []
        self._live: LiveConsole | NotebookConsole | None = None
        self._pace = Pace()
        self._seen: Mapping[str, float] = {}
        self._validating_since: tuple[str, float] | None = None
        self._began = 0.0
        self._state = State.IDLE
        self._shares_at = 0.0
        self._last_shares: Mapping[str, float] = {}
        self._missing_told = False
        self._show_next: Callable[..., Any] | None = None

    # -- hooks ---------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Hook what the settings need."""
        super().attach(trainer)
        self._speaks = _rank() == 0
        if not self._speaks:
            return
        forget_in_children(self)
        self._wants_live = (
            self.level != "minimal"
            and "console" in self.to
            and (live_wanted(sys.stdout, os.environ) or in_notebook())
        )
        trainer.after(Trigger.RESUME)(self._after_resume)
        if self.level == "verbose":
            for trigger in Trigger:
                trainer.after(trigger)(self._teller(trigger))
        if self.every_batches is not None:
            trainer.after(Trigger.END_BATCH)(self._after_batch)
        if self._wants_live:
            trainer.after(Trigger.BEGIN_EPOCH)(self._draw)
            trainer.after(Trigger.END_BATCH)(self._draw_if_due)
        if self.level != "minimal":
            trainer.after(Trigger.END_EPOCH)(self._after_epoch)
        trainer.on(State.DONE)(self._on_done)
        trainer.on(State.HALTED)(self._on_halted)

    def on_train_begin(self) -> None:
        """Open what is logged to, and say what begins."""
        if not self._speaks or self.trainer.replaying or self.trainer.rehearsing:
            return
        self.close()
        trainer = self.trainer
        self._pace, self._seen, self._began = Pace(), {}, time.monotonic()
        self._state = trainer.state
        self._sinks = [self._sink(target) for target in self.to]
        self._watch_warnings()
        run = "" if trainer.run is None else f"run {trainer.run.path}, "
        attempt = "" if trainer.attempt < 2 else f"attempt {trainer.attempt}, "
        self._say("start", f"{run}{attempt}{_device(trainer.device)}: {self._extent()}")
        if trainer.warm_start is not None:
            self._say("start", str(trainer.warm_start))

    def _after_resume(self) -> None:
        trainer = self.trainer
        # How many are done as well, since the epochs of the table are counted from 1, and places from 0.
        done = f"{self._amount()} done" if trainer.batches else "nothing done yet"
        self._say("resume", f"resumed at {self._place()} ({trainer.state.value}), {done}")

    def _teller(self, trigger: Trigger) -> Callable[[], None]:
        def tell() -> None:
            trainer = self.trainer
            source, self._state = self._state, trainer.state
            phase = f", phase {trainer.phase}" if trainer.phase and trigger in _OF_A_PHASE else ""
            move = f"{trigger.value:<11}  {source.value:>11} -> {self._state.value:<11}"
            self._say("transition", f"{move}  {self._place()}{phase}")

        return tell

    def _after_batch(self) -> None:
        trainer = self.trainer
        assert self.every_batches is not None
        if trainer.batches % self.every_batches == 0:
            batch = f"batch {_of(trainer.batch + 1, trainer.batches_per_epoch)}"
            self._say("batch", f"{self._epoch_count()}  {batch}", trainer.metrics)

    def _after_epoch(self) -> None:
        trainer = self.trainer
        metrics = trainer.history[-1]
        self._tell_missing(metrics)
        if (trainer.epoch + 1) % self.every_epochs == 0 or trainer.ending:
            self._say("epoch", self._epoch_count(), metrics)

    def _on_done(self) -> None:
        trainer, took = self.trainer, span(time.monotonic() - self._began)
        reason = f": {trainer.reason}" if trainer.reason else ""
        lines = [f"done after {self._amount()}, {took}{reason}"]
        best = headline(trainer.history, self.metrics, trainer.epochs)
        self._end("done", lines + [f"  {text}" for text in best])

    def _on_halted(self) -> None:
        trainer, took = self.trainer, span(time.monotonic() - self._began)
        lines = [f"halted at {self._place()}, {took}: {trainer.reason}"]
        # Of a failure the transition's note goes on with the way back.
        way_back = trainer._training.work.note.removeprefix(f"{trainer.reason}; ") if trainer.tainted else ""
        self._end("halt", [*lines, *([f"  {way_back}"] if way_back else [])])

    def _end(self, kind: Kind, lines: list[str]) -> None:
        if self.trainer.run is not None:
            lines.append(f"  run {self.trainer.run.path}")
        self._say(kind, "\n".join(lines))
        self._close_live()

    # -- the live line -------------------------------------------------------------------------------

    def _draw_if_due(self) -> None:
        if self._live is not None and self._live.due:
            self._draw()

    def _draw(self) -> None:
        if self._live is None or self.trainer.rehearsing:
            return
        trainer = self.trainer
        self._pace.mark(time.monotonic(), trainer.batches)
        if trainer.latest:
            values = shown(trainer.latest, self.metrics)
            self._seen = {name: value for name, value in values.items() if name != "batch_time"}
        self._live.draw()

    def _progress(self) -> Progress:
        """What the live line shows now; also called from its thread, so it only looks."""
        trainer = self.trainer
        # Between fetch and end_batch the batch at hand is not complete.
        complete = trainer.batch + (1 if trainer.state in (State.BATCH_END, State.EPOCH_END) else 0)
        batch = max(0, complete)
        left = batches_left(
            trainer.batches,
            trainer.epoch,
            batch,
            trainer.epochs,
            trainer.batches_per_epoch,
            trainer.max_batches,
        )
        rate = self._pace.rate
        return Progress(
            epoch=trainer.epoch + 1,
            epochs=trainer.epochs,
            batches=batch,
            batches_per_epoch=trainer.batches_per_epoch,
            doing=self._doing(),
            seconds_left=left / rate if left is not None and rate else None,
            state=trainer.state.value,
            rate=rate,
            shares=self._shares(),
            metrics=self._seen,
        )

    def _shares(self) -> Mapping[str, float]:
        """Where the time of the newest batches went; looked up once a second."""
        now = time.monotonic()
        if now - self._shares_at >= 1.0:
            self._shares_at = now
            spent = self.trainer._training.spent()
            whole = sum(spent.values())
            self._last_shares = {t.value: ns / whole for t, ns in spent.items()} if whole else {}
        return self._last_shares

    def _doing(self) -> str:
        trainer = self.trainer
        validating = trainer.validating
        if validating is None:
            self._validating_since = None
            if (waits := self._waits()) is not None:
                return waits
            between = trainer.state in (State.BATCH_END, State.EPOCH_START, State.EPOCH_END)
            return "" if between else trainer.phase
        now, since = time.monotonic(), self._validating_since
        if since is None or since[0] != validating:
            since = self._validating_since = (validating, now)
        return f"validating {validating} {clock(now - since[1])}"

    def _waits(self) -> str | None:
        """What has been going on for some seconds, so that it shows what a training hangs in."""
        under_way = self.trainer._training.under_way()
        if under_way is None or under_way[1] < _LONG:
            return None
        return f"{under_way[0]} {clock(under_way[1])}"

    # -- what is said --------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Say something that is neither start, end nor warning; not at level "minimal"."""
        if self.level != "minimal":
            self._say("message", text)

    def announce(self, text: str) -> None:
        """The same before the training begins, when there is a console but no run to keep a file in."""
        if self.level != "minimal" and self._speaks:
            record = self._record("message", text, {})
            for target in self.to:
                if target == "console":
                    PlainConsole(sys.stdout).write(record)
                elif callable(target):
                    target(record)

    def _say(self, kind: Kind, message: str, metrics: Mapping[str, float] | None = None) -> None:
        if self._sinks and not self.trainer.rehearsing:
            record = self._record(kind, message, metrics or {})
            for sink in self._sinks:
                sink.write(record)

    def _record(self, kind: Kind, message: str, metrics: Mapping[str, float]) -> LogRecord:
        trainer = self.trainer
        chosen = shown(metrics, self.metrics)
        return LogRecord(time.time(), kind, message, trainer.epoch, trainer.batch, chosen)

    def _extent(self) -> str:
        trainer = self.trainer
        length = trainer.batches_per_epoch
        of = "" if length is None else f" of {_amount(length, 'batch', 'batches')}"
        limit = "" if trainer.max_batches is None else _amount(trainer.max_batches, "batch", "batches")
        if trainer.epochs is None:
            return f"{limit}{'' if length is None else f', epochs{of}'}"
        epochs = _amount(trainer.epochs, "epoch", "epochs") + of
        return f"{epochs}, at most {limit}" if limit else epochs

    def _amount(self) -> str:
        trainer = self.trainer
        epochs = _amount(len(trainer.history), "epoch", "epochs")
        return f"{epochs} and {_amount(trainer.batches, 'batch', 'batches')}"

    def _epoch_count(self) -> str:
        return f"epoch {_of(self.trainer.epoch + 1, self.trainer.epochs)}"

    def _place(self) -> str:
        trainer = self.trainer
        if trainer.epoch < 0:
            return "the beginning"
        return f"epoch {trainer.epoch}" + (f", batch {trainer.batch}" if trainer.batch >= 0 else "")

    def _tell_missing(self, metrics: Mapping[str, float]) -> None:
        """Once, after the first epoch: a name to show that is neither a batch's nor an epoch's metric."""
        if self._missing_told or self.metrics is None:
            return
        self._missing_told = True
        known = {**metrics, **self.trainer.metrics}
        missing = [name for name in self.metrics if name not in known]
        if missing:
            warn(
                f"Logging(metrics=...) names {', '.join(missing)}, which is not among the metrics: "
                f"{', '.join(sorted(known))}"
            )

    # -- what is logged to ---------------------------------------------------------------------------

    def _sink(self, target: Target) -> Sink:
        if target == "console":
            return self._console()
        if target == "file":
            run = self.trainer.run
            assert run is not None
            return FileLog(run.console_log)
        assert callable(target)
        return FunctionSink(target)

    def _console(self) -> Sink:
        out, err = sys.stdout, sys.stderr
        if self._wants_live and in_notebook():
            self._live = NotebookConsole(self._progress)
            return self._live
        if self._wants_live and live_wanted(out, os.environ):
            from orchestrator.callbacks.logs.live import LiveConsole  # rich is slow to import

            streams = [out, err] if live_wanted(err, os.environ) else [out]
            try:
                self._live = LiveConsole(self._progress, *streams)
            except AttributeError:  # a stand-in for a stream whose methods cannot be replaced
                return PlainConsole(out)
            return self._live
        return PlainConsole(out)

    def _watch_warnings(self) -> None:
        """Let warnings into the file and the functions; they show on the console the way they always do."""
        if self._show_next is None:  # else somebody has put theirs before ours, which is still in the chain
            self._show_next = warnings.showwarning
            warnings.showwarning = self._show_warning

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        show_next = self._show_next or _showwarning
        show_next(message, category, filename, lineno, file, line)
        if file is None and self._sinks:
            record = self._record("warning", f"{category.__name__}: {message} ({filename}:{lineno})", {})
            for sink in self._sinks:
                if not isinstance(sink, PlainConsole) and sink is not self._live:
                    sink.write(record)

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.close()
            self._sinks = [sink for sink in self._sinks if sink is not self._live]
            self._live = None

    def close(self) -> None:
        """Take the live line away, and close the file. Called at the end of each attempt; idempotent."""
        self._close_live()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
        if self._show_next is not None and warnings.showwarning == self._show_warning:
            warnings.showwarning = self._show_next
            self._show_next = None

    def forget(self) -> None:
        """In a forked child, such as a data worker: say nothing."""
        self._sinks, self._live = [], None


_OF_A_PHASE = frozenset({Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP})
_showwarning = warnings.showwarning


def _targets(to: Any) -> tuple[Target, ...]:
    targets = tuple(to) if isinstance(to, Sequence) and not isinstance(to, str) else (to,)
    for target in targets:
        if not callable(target) and target not in ("console", "file"):
            raise ConfigurationError(
                f'Logging(to=...) was given {target!r}; expected "console", "file", or a function of a LogRecord'
            )
    return tuple(dict.fromkeys(targets))


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _amount(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _of(number: int, total: int | None) -> str:
    return str(number) if total is None else f"{number:>{len(str(total))}}/{total}"


def headline(
    history: Sequence[Mapping[str, float]], chosen: Sequence[str] | None, epochs: int | None = None
) -> list[str]:
    """The best and the last value of the metrics that matter most, a line for each; two at most.

    Those are the first of the `chosen` ones; without a choice, those of validation, or else the loss.
    Metrics whose names do not say which way is better are left out.
    """
    if not history:
        return []
    lines: list[str] = []
    for name in _candidates(history[-1]) if chosen is None else chosen:
        try:
            watched = Watched(name, direction_of(name, None))
        except ConfigurationError:
            continue
        best, best_epoch = watched.worst, -1
        for epoch, metrics in enumerate(history):
            if name in metrics and watched.improved(metrics[name], best):
                best, best_epoch = metrics[name], epoch
        if best_epoch >= 0 and len(lines) < 2:
            last = history[-1].get(name)
            after = "" if last is None else f", last {quantity(name, last)}"
            lines.append(
                f"{name}: best {quantity(name, best)} at epoch {_of(best_epoch + 1, epochs).strip()}{after}"
            )
    return lines


def _candidates(metrics: Mapping[str, float]) -> list[str]:
    own = ("loss", "grad", "memory", "lr")
    validated = [name for name in metrics if "/" in name and name.split("/")[0] not in own]
    return validated or ["loss"]
