"""`interlock show`: all about one run on a page: where it stands, what happened, and how to go on."""

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from orchestrator.commands.arguments import json_option, reference, root_of, root_option, run_argument
from orchestrator.commands.layout import (
    age,
    count,
    date,
    duration,
    heading,
    number,
    padded,
    size,
    table,
    to_json,
)
from orchestrator.commands.resume import ResumeError, read_command
from orchestrator.commands.runs import label
from orchestrator.commands.standing import (
    Measured,
    Standing,
    newest_metrics,
    origin_of,
    places_of,
    standing_of,
)
from orchestrator.commands.sync import in_words
from orchestrator.errors import NonFiniteError
from states.errors import InterlockError
from states.table import State, Trigger
from tracking.journal import TRAIN, Attempt, Checkpoint, Journal, RunInfo
from tracking.masking import mask_text
from tracking.runs import RunFolder
from tracking.shipper import DeliveryStatus, status

__all__ = ["delivery_of", "show"]

_REMOVED_SHOWN = 3


@click.command()
@run_argument()
@json_option
@root_option
@click.pass_context
def show(ctx: click.Context, run: RunFolder, as_json: bool) -> None:
    """Show where RUN stands, what it has done, and how to go on.

    Its attempts, newest metrics, checkpoints and delivery; also while it trains, and after its process was
    killed: the state is that of its newest transition.

    \b
    Example:
      interlock show digits
      interlock show runs/digits-20240131-120000-ab12 --json
    """
    with Journal.open(run) as journal:
        page = _Page(run, journal, root_of(ctx))
        click.echo(to_json(page.values(), indent=1) if as_json else "\n".join(page.lines()))


class _Page:
    """What is known of a run at this moment, and its two forms."""

    def __init__(self, run: RunFolder, journal: Journal, root: Path):
        self.run = run
        self.reference = reference(run, root)
        self.info: RunInfo = journal.run_info()
        self.origin = origin_of(run, self.info.parent)
        self.standing: Standing = standing_of(run, journal)
        self.attempts = self.standing.life.attempts
        self.positions = places_of(run, {attempt.position for attempt in self.attempts if attempt.position})
        self.metrics: list[Measured] = newest_metrics(run)
        self.checkpoints: list[Checkpoint] = journal.checkpoints(
            include_removed=True, include_superseded=True
        )
        self.delivery = delivery_of(run)
        self.now_ns = time.time_ns()

    def values(self) -> dict[str, Any]:
        """The page for programs."""
        last, standing = self.standing.last, self.standing
        return {
            "id": self.info.id,
            "name": self.info.name,
            "folder": self.run.path,
            "created_ns": self.info.created_ns,
            "origin": self.origin,
            "kind": standing.kind,
            "state": standing.state,
            "epoch": standing.place.epoch,
            "batch": standing.place.batch,
            "epochs": standing.epochs,
            "batches": standing.batches,
            "loss": standing.loss,
            "seq": last.seq if last else 0,
            "holder": standing.life.holder,
            "attempts": self.attempts,
            "metrics": self.metrics,
            "checkpoints": self.checkpoints,
            "delivery": self.delivery,
            "commands": [command for command, _ in self.commands()],
        }

    def lines(self) -> Iterator[str]:
        """The page for people."""
        yield from self._head()
        yield ""
        yield from self._attempts()
        if self.metrics:
            yield ""
            yield from self._metrics()
        yield ""
        yield from self._checkpoints()
        yield ""
        yield heading("Delivery")
        yield from map("  {}".format, self._delivery())
        yield ""
        yield heading("Go on")
        commands = list(self.commands())
        width = max(len(command) for command, _ in commands)
        for command, purpose in commands:
            yield f"  {padded(command, width)}  {click.style(purpose, dim=True)}"

    def _head(self) -> Iterator[str]:
        made = f"{date(self.info.created_ns)}, {age(self.now_ns - self.info.created_ns)}"
        yield heading(self.info.id)
        yield f"  state    {label(self.standing)}{self._where()}"
        yield f"  done     {self._done()}"
        yield f"  begun    {made}"
        if self.origin is not None:
            yield f"  origin   {self.origin}"
        yield f"  folder   {_short(self.run.path)}"
        if self.attempts:
            newest = self.attempts[-1]
            versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
            yield f"  with     {', '.join(filter(None, (newest.device, versions)))}"

    def _where(self) -> str:
        last, life = self.standing.last, self.standing.life
        place = self.standing.place
        match self.standing.kind:
            case "new":
                return f", {life.holder} is about to begin" if life.holder else ", nothing has begun yet"
            case "running":
                newest = f", {age(self.now_ns - last.time_ns)}" if last else ""
                return f" {place}{newest}; {life.holder}"
            case "died":
                return f" in {self.standing.state.value} {place}; no end is written down yet"
            case "ended":
                halted = last is not None and last.trigger is Trigger.HALT
                source = f" in {last.source.value}" if last is not None and halted else ""
                reason = self.attempts[-1].reason
                where = "" if self.standing.state is State.DONE else f"{source} {place}"
                starting = f"; {life.holder} is about to go on" if life.holder else ""
                return f"{where}: {reason}{starting}" if reason else f"{where}{starting}"

    def _done(self) -> str:
        wanted = self.attempts[-1].params if self.attempts else {}
        parts = [_progress(self.standing.epochs, wanted.get("epochs"), "epoch")]
        if self.standing.batches is not None:
            parts.append(_progress(self.standing.batches, wanted.get("max_batches"), "batch", "batches"))
        return ", ".join(parts)

    def _attempts(self) -> Iterator[str]:
        yield heading("Attempts")
        rows = [
            [
                f"  {attempt.attempt}",
                date(attempt.started_ns),
                duration((attempt.ended_ns or self._open_until()) - attempt.started_ns),
                _outcome(attempt, self.standing),
                self._from(attempt),
                _reason(attempt),
            ]
            for attempt in self.attempts
        ]
        if rows:
            yield from table(["  #", "started", "took", "outcome", "from", "reason"], rows, right="rlr")
        else:
            yield "  none yet"

    def _open_until(self) -> int:
        """Until when an attempt without an end has gone on."""
        last = self.standing.last
        if self.standing.life.running:
            return self.now_ns
        return max(last.time_ns if last else 0, self.attempts[-1].started_ns)

    def _from(self, attempt: Attempt) -> str:
        if not attempt.position:
            return "the beginning"
        found = self.positions.get(attempt.position)
        return f"{found.state.value} {found}" if found else f"transition {attempt.position}, which is missing"

    def _metrics(self) -> Iterator[str]:
        train = self.metrics[0]
        yield heading(f"Metrics of epoch {train.epoch}")
        keys = list(dict.fromkeys(key for measured in self.metrics for key in measured.values))
        rows = [
            [f"  {key}", *(number(measured.values.get(key)) for measured in self.metrics)] for key in keys
        ]
        names = [_of_scope(measured, train.epoch) for measured in self.metrics]
        yield from table(["  metric", *names], rows, right="l" + "r" * len(names))

    def _checkpoints(self) -> Iterator[str]:
        kept = [checkpoint for checkpoint in self.checkpoints if checkpoint.removed_ns is None]
        removed = [checkpoint for checkpoint in self.checkpoints if checkpoint.removed_ns is not None]
        yield heading("Checkpoints")
        if not self.checkpoints:
            yield "  none yet"
            return
        shown = sorted((*kept, *removed[-_REMOVED_SHOWN:]), key=lambda checkpoint: checkpoint.id)
        rows = [
            [f"  {found.name}", size(found.size_bytes), self._kept(found), _some_metrics(found)]
            for found in shown
        ]
        yield from table(["  name", "size", "", "metrics"], rows, right="lr")
        if len(removed) > _REMOVED_SHOWN:
            yield f"  and {len(removed) - _REMOVED_SHOWN:,} more that retention removed"

    def _kept(self, checkpoint: Checkpoint) -> str:
        if checkpoint.removed_ns is not None:
            return click.style("removed", dim=True)
        if not (self.run.checkpoints / checkpoint.name).is_dir():
            return click.style("gone", fg="red")
        return click.style("superseded", fg="yellow") if checkpoint.superseded else "kept"

    def _delivery(self) -> Iterator[str]:
        found = self.delivery
        if isinstance(found, str):
            yield click.style(found, fg="red")
            return
        if not found.tracked:
            yield "none: made with track=None"
            return
        yield f"to       {found.place}"
        if found.remote_run_id:
            yield f"run      {found.remote_run_id}{f'  {found.url}' if found.url else ''}"
        yield f"there    {in_words(found.points_delivered, found.artifacts_delivered) or 'nothing yet'}"
        waiting = in_words(found.points_waiting, len(found.artifacts_waiting))
        if waiting or found.shipper:
            who = f"{found.shipper} delivers it" if found.shipper else "nobody is delivering it"
            yield f"waiting  {waiting or 'nothing'}; {who}"
        if found.trouble:
            yield f"trouble  {click.style(found.trouble, fg='red')}"

    def commands(self) -> Iterator[tuple[str, str]]:
        """What can be typed next, and what it is for."""
        state = self.standing
        if state.kind == "running":
            yield f"interlock watch {self.reference}", "watch it train"
            yield f"interlock log {self.reference} --follow", "read along"
        else:
            yield f"interlock log {self.reference}", "read its transitions"
        if _met_nonfinite(self.attempts):
            yield f"interlock blame {self.reference}", "name the module that the NaN or infinity came from"
        if state.kind in ("died", "ended") and state.state is not State.DONE and _can_resume(self.run):
            yield f"interlock resume {self.reference}", "go on from its newest checkpoint"
        if state.kind == "died" or (state.kind == "ended" and state.state is not State.DONE):
            yield f"interlock doctor {self.reference}", "see what is wrong with it, and what to do"
        yield f"interlock check {self.reference}", "prove that journal and checkpoints are sound"
        yield f"interlock diagram {self.reference} -o machine.svg", "draw its machine, with counts and times"
        yield f"interlock timeline {self.reference}", "see where its time went"
        if isinstance(self.delivery, str):
            return
        if (self.delivery.points_waiting or self.delivery.artifacts_waiting) and not self.delivery.shipper:
            yield f"interlock sync {self.reference}", "deliver what is waiting"
        if self.delivery.command:
            yield self.delivery.command, "browse it in MLflow"


def delivery_of(run: RunFolder) -> DeliveryStatus | str:
    """What is delivered, passwords masked; or why that cannot be told."""
    try:
        found = status(run)
    except InterlockError as error:
        return str(error)
    return replace(
        found,
        place=mask_text(found.place),
        url=mask_text(found.url),
        command=mask_text(found.command),
        trouble=mask_text(found.trouble),
    )


def _progress(done: int, wanted: object, noun: str, plural: str = "") -> str:
    """'3 of 5 epochs', or '3 epochs' where no number was asked for."""
    if isinstance(wanted, int):
        return f"{done:,} of {count(wanted, noun, plural)}"
    return count(done, noun, plural)


def _short(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _outcome(attempt: Attempt, standing: Standing) -> str:
    colours = {"done": "green", "stopped": "yellow", "failed": "red", "died": "red", "running": "green"}
    outcome = attempt.outcome or ("running" if standing.life.running else "died")
    return click.style(outcome, fg=colours[outcome])


def _reason(attempt: Attempt) -> str:
    return " ".join((attempt.exception or attempt.reason).split())


def _of_scope(measured: Measured, epoch: int) -> str:
    name = measured.scope if measured.scope == TRAIN else measured.scope.removeprefix("validation/")
    if (measured.epoch, measured.batch) == (epoch, -1):
        return name
    place = f"epoch {measured.epoch}" + (f", batch {measured.batch}" if measured.batch >= 0 else "")
    return f"{name} ({place})"


def _some_metrics(checkpoint: Checkpoint) -> str:
    """Those of validation, if there are any; there is room for a few."""
    chosen = [key for key in checkpoint.metrics if "/" in key] or list(checkpoint.metrics)
    return ", ".join(f"{key} {number(checkpoint.metrics[key])}" for key in chosen[:2])


def _met_nonfinite(attempts: Sequence[Attempt]) -> bool:
    """Did the newest attempt fail because a loss or gradient was NaN or infinite?"""
    return bool(attempts) and attempts[-1].exception.startswith(NonFiniteError.__name__)


def _can_resume(run: RunFolder) -> bool:
    try:
        read_command(run)
    except ResumeError:
        return False
    return True
