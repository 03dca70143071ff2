"""`interlock watch`: a run while it goes on: where it is, for how long already, how fast, where the time goes."""

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from orchestrator.callbacks.logs.record import clock, shown, span
from orchestrator.commands.arguments import json_option, root_option, run_argument
from orchestrator.commands.layout import age, count, duration, heading, number, padded, size, to_json
from orchestrator.commands.layout import clock as time_of_day
from orchestrator.commands.moment import Moment, seize
from orchestrator.commands.runs import label
from orchestrator.commands.show import delivery_of
from orchestrator.commands.sync import in_words
from states.table import State, Trigger
from tracking.journal import Attempt, Journal
from tracking.runs import RunFolder
from tracking.shipper import DeliveryStatus
from tracking.tally import BETWEEN, VALIDATION

__all__ = ["STATUSES", "spark", "watch"]

STATUSES = {"done": 0, "failed": 1, "stopped": 3, "died": 4}
"""The exit status for each way in which an attempt ends; 2 is that of a wrong command line."""

_WIDTH = 100  # where no terminal says
_SPARKS = "▁▂▃▄▅▆▇█"
_ODD = "!"
_SPARK_COLUMNS = 32
_BAR_COLUMNS = 28
_MOST_ATTEMPTS = 4
_SIDE = 10  # columns of the words at the left
_WORTH_TELLING_NS = 50_000_000


@click.command()
@run_argument()
@click.option("--once", is_flag=True, help="Print how it stands now, once; what a pipe gets, too.")
@click.option(
    "--every",
    type=click.FloatRange(0.1),
    default=1.0,
    metavar="SECONDS",
    help="How often to look.  [default: 1]",
)
@json_option
@root_option
@click.pass_context
def watch(ctx: click.Context, run: RunFolder, once: bool, every: float, as_json: bool) -> None:
    """Watch RUN while it trains: where it is, how fast, and where the time goes.

    What the machine works on, and for how long already, comes from the flight recorder: a stall is seen while it
    lasts, and the training notices nothing. Ends with the training; the exit status says how it ended: 0 DONE, 1 by
    an exception, 3 stopped (by a signal, say), 4 the process died. With --once or --json, 0 also where it goes on.

    \b
    Example:
      interlock watch digits
      interlock watch digits --once
      interlock watch digits --json | jq .work
    """
    with Journal.open(run) as journal:
        if as_json or once or not sys.stdout.isatty():
            moment = seize(run, journal)
            if as_json:
                click.echo(to_json(_values(moment), indent=1))
            else:
                click.echo("\n".join(_Frame(moment, _columns()).lines()))
        else:
            moment = _live(run, journal, every, colour=ctx.color is not False)
    ctx.exit(_status(moment))


def _columns() -> int:
    return shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH


def _live(run: RunFolder, journal: Journal, every: float, *, colour: bool) -> Moment:
    """Draw again and again, until nobody is at work; the last of what was seen."""
    from rich.console import Console  # slow to import
    from rich.live import Live
    from rich.text import Text

    console = Console(no_color=not colour, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            moment = seize(run, journal)
            lines = _Frame(moment, console.width).lines(None if moment.over else console.height - 1)
            text = Text.from_ansi("\n".join(lines))
            text.no_wrap, text.overflow = True, "ellipsis"
            live.update(text, refresh=True)
            if moment.over:
                return moment
            time.sleep(every)


def _status(moment: Moment) -> int:
    life = moment.standing.life
    if life.died:
        return STATUSES["died"]
    outcome = life.attempts[-1].outcome if life.attempts and moment.over else None
    return STATUSES[outcome] if outcome else 0


def _values(moment: Moment) -> dict[str, Any]:
    """The moment for programs."""
    standing, work, delivery = moment.standing, moment.work, delivery_of(moment.run)
    losses = moment.losses
    return {
        "id": moment.info.id,
        "name": moment.info.name,
        "folder": moment.run.path,
        "time_ns": moment.now_ns,
        "kind": standing.kind,
        "state": standing.state,
        "epoch": standing.place.epoch,
        "batch": standing.place.batch,
        "epochs": moment.wanted("epochs"),
        "max_batches": moment.wanted("max_batches"),
        "batches_per_epoch": moment.wanted("batches_per_epoch"),
        "batches_in_epoch": moment.batches_in_epoch,
        "batches": standing.batches,
        "work": work
        and {
            "trigger": work.trigger,
            "words": work.words,
            "for_ns": moment.now_ns - work.since_ns,
            "usual_ns": work.usual_ns,
            "unusual": work.unusual(moment.now_ns),
        },
        "batches_per_s": moment.pace.batches_per_s,
        "seconds_left": moment.pace.seconds_left,
        "loss": losses[-1] if losses else standing.loss,
        "spent": moment.spent,
        "holder": standing.life.holder,
        "process": moment.process,
        "attempts": moment.attempts,
        "metrics": moment.metrics,
        "checkpoints": moment.checkpoints,
        "delivery": delivery,
        "warnings": moment.warnings,
    }


@dataclass(frozen=True)
class _Part:
    """Lines that belong together; parts of a higher rank are left out first where there is no room."""

    rank: int
    lines: list[str]


class _Frame:
    """The moment for people, in columns; as many parts of it as there are rows for."""

    def __init__(self, moment: Moment, width: int):
        self._moment = moment
        self._standing = moment.standing
        self._width = width

    def lines(self, height: int | None = None) -> list[str]:
        """At most `height` lines; the least important parts are left out."""
        parts = [
            _Part(0, list(self._head())),
            _Part(3, list(self._spent())),
            _Part(4, list(self._metrics())),
            _Part(5, list(self._attempts())),
            _Part(6, list(self._files())),
            _Part(2, list(self._warnings())),
            _Part(1, list(self._end())),
        ]
        parts = [part for part in parts if part.lines]
        if height is None:
            return _joined(parts, apart=True)
        while len(parts) > 1 and len(_joined(parts)) > height:
            parts.remove(max(parts, key=lambda part: part.rank))
        return _joined(parts, apart=len(_joined(parts, apart=True)) <= height)[:height]

    def _head(self) -> Iterator[str]:
        moment, standing = self._moment, self._standing
        holder, process = standing.life.holder, moment.process
        who = [str(holder)] if holder else []
        memory = [size(process.memory_bytes)] if process else []
        yield self._fitted("", [f"{heading(moment.info.id)}  {label(standing)}", *who, *memory])
        yield self._fitted("epoch", self._progress())
        yield self._fitted("now", self._now())
        if process is not None and process.state == "T":
            said = f"the process is stopped (SIGSTOP, Ctrl-Z); `kill -CONT {holder.pid if holder else 0}` lets it go on"
            yield _side("", click.style(said, fg="red"))
        losses = moment.losses
        newest = losses[-1] if losses else standing.loss
        if newest is not None:
            line = spark(losses, min(_SPARK_COLUMNS, self._width // 3))
            said = f"the last {count(len(losses), 'batch', 'batches')}"
            shape = [click.style(line, fg="cyan"), click.style(said, dim=True)] if len(losses) > 1 else []
            yield self._fitted("loss", [padded(_loss(newest), 8), *shape])

    def _fitted(self, word: str, parts: list[str]) -> str:
        """The parts in a line; the last ones are left out where there is no room, but never the first."""
        while (
            len(parts) > 1 and _SIDE + sum(len(click.unstyle(part)) + 2 for part in parts) - 2 > self._width
        ):
            parts = parts[:-1]
        return _side(word, "  ".join(parts)) if word else "  ".join(parts)

    def _progress(self) -> list[str]:
        moment = self._moment
        place, length = self._standing.place, moment.wanted("batches_per_epoch")
        done, most = moment.batches_in_epoch, moment.wanted("max_batches")
        rate, left = moment.pace.batches_per_s, moment.pace.seconds_left
        parts = [_of(max(0, place.epoch) + 1, moment.wanted("epochs"))]
        if length:
            parts.append(_bar(done / length, max(6, self._width // 5)))
        parts.append(f"batch {_of(done, length)}")
        if left is not None:
            of_epoch = moment.wanted("epochs") is None and most is None
            parts.append(f"eta {clock(left)}{' of the epoch' if of_epoch else ''}")
        if rate is not None:
            parts.append(f"{rate:.3g} batches/s")
        if self._standing.batches is not None:
            parts.append(f"{_of(self._standing.batches, most)} in all")
        return parts

    def _now(self) -> list[str]:
        moment, work, state = self._moment, self._moment.work, self._standing.state.value
        if work is None:
            return [self._ended()]
        took = moment.now_ns - work.since_ns
        said = f"{work.words} for {span(max(0.0, took / 1e9))}" if took > _WORTH_TELLING_NS else work.words
        if not work.unusual(moment.now_ns):
            return [f"{state} → {said}"]
        usual = f", usually {duration(work.usual_ns)}" if work.usual_ns is not None else ""
        return [f"{state} → {click.style(said + usual, fg='yellow', bold=True)}"]

    def _ended(self) -> str:
        standing, attempts = self._standing, self._moment.attempts
        if not attempts:
            return "nothing has begun yet"
        last = standing.last
        when = f", {age(self._moment.now_ns - last.time_ns)}" if last else ""
        if standing.kind == "died":
            place = f" in {standing.state.value} {standing.place}"
            return click.style(f"the process died{place}{when}", fg="red")
        newest = attempts[-1]
        reason = " ".join((newest.exception or newest.reason).split())
        if standing.state is State.DONE:
            return f"{reason or 'done'}{when}"
        source = last.source.value if last is not None and last.trigger is Trigger.HALT else ""
        return f"halted in {source} {standing.place}{when}: {reason}"

    def _spent(self) -> Iterator[str]:
        moment = self._moment
        order = [trigger.value for trigger in Trigger] + [VALIDATION, BETWEEN]
        found = [(name, moment.spent[name]) for name in order if name in moment.spent]
        whole = sum(total.ns for _, total in found)
        if not whole:
            return
        batches = moment.spent.get(Trigger.END_BATCH.value)
        of = count(batches.count, "batch", "batches") if batches else "moments"
        over = " went" if moment.over else " goes"
        yield heading(f"Where the time{over}: the last {of}, {duration(whole)}")
        most = max(total.ns for _, total in found)
        columns = min(_BAR_COLUMNS, self._width // 3)
        for name, total in sorted(found, key=lambda pair: -pair[1].ns):
            share = total.ns / whole
            if share < 0.002:
                continue
            bar = _bar(total.ns / most, columns, rest=" ")
            said = f"  {padded(name, 12)} {bar} {share:6.1%}"
            if name == BETWEEN:
                yield f"{said}  {click.style('saves, and other things between two transitions', dim=True)}"
            elif name == VALIDATION:
                yield said
            else:
                each = f"{duration(total.ns // total.count)} each"
                yield f"{said}  {padded(each, 13, right=True)}, {duration(total.most_ns)} at most"

    def _metrics(self) -> Iterator[str]:
        for measured in self._moment.metrics:
            if not measured.values:
                continue
            place = f"epoch {_of(measured.epoch + 1, self._moment.wanted('epochs'))}"
            place += f", batch {measured.batch}" if measured.batch >= 0 else ""
            values = shown(measured.values, None)
            yield _side(
                measured.scope.removeprefix("validation/"),
                f"{click.style(place, dim=True)}  "
                + "  ".join(
                    f"{click.style(key, dim=True)} {number(value, 4)}" for key, value in values.items()
                ),
            )

    def _attempts(self) -> Iterator[str]:
        attempts = self._moment.attempts
        if len(attempts) < 2:
            return
        hidden = len(attempts) - _MOST_ATTEMPTS
        yield heading("Attempts") + (f", {hidden} before these" if hidden > 0 else "")
        for attempt in attempts[-_MOST_ATTEMPTS:]:
            yield f"  {attempt.attempt}  {self._attempt(attempt)}"

    def _attempt(self, attempt: Attempt) -> str:
        life, last = self._standing.life, self._standing.last
        outcome = attempt.outcome or ("running" if life.running else "died")
        until = attempt.ended_ns or (self._moment.now_ns if life.running or not last else last.time_ns)
        took = duration(max(0, until - attempt.started_ns))
        place = self._moment.positions.get(attempt.position or 0)
        begun = f"from {place.state.value} {place}" if place else "from the beginning"
        reason = " ".join((attempt.exception or attempt.reason).split())
        said = reason if attempt.outcome in ("stopped", "failed") else ""
        return f"{padded(outcome, 8)} {padded(took, 7, right=True)}  {begun}{f': {said}' if said else ''}"

    def _files(self) -> Iterator[str]:
        moment = self._moment
        if moment.checkpoints:
            newest = moment.checkpoints[-1]
            saved = f"{count(len(moment.checkpoints), 'checkpoint')}, the newest {newest.name}"
            yield _side("saved", f"{saved}, {size(newest.size_bytes)}, {age(moment.now_ns - newest.time_ns)}")
        delivery = delivery_of(moment.run)
        if isinstance(delivery, str):
            yield _side("delivery", click.style(delivery, fg="red"))
        elif delivery.tracked:
            yield _side("delivery", _delivery(delivery))

    def _warnings(self) -> Iterator[str]:
        for warning in self._moment.warnings:
            text = " ".join(warning.message.split())
            yield click.style(_side("warning", f"{time_of_day(warning.time_ns)[:8]}  {text}"), fg="yellow")

    def _end(self) -> Iterator[str]:
        if not self._moment.over:
            return
        if self._standing.kind == "died" or (
            self._standing.kind == "ended" and self._standing.state is not State.DONE
        ):
            yield _side("", f"`interlock show {self._moment.info.id}` says how to go on")


def _joined(parts: Sequence[_Part], *, apart: bool = False) -> list[str]:
    """The lines of all parts, with an empty one before each where they are set `apart`."""
    return [line for number, part in enumerate(parts) for line in [""] * (apart and number > 0) + part.lines]


def _side(word: str, text: str) -> str:
    return f"{click.style(padded(word, _SIDE), dim=True)}{text}"


def _of(done: int, whole: int | None) -> str:
    return f"{done:,}" if whole is None else f"{done:,}/{whole:,}"


def _bar(share: float, width: int, rest: str = "─") -> str:
    done = min(width, int(share * width + 0.5))
    return click.style("━" * done, fg="cyan") + click.style(rest * (width - done), dim=True)


def _loss(value: float) -> str:
    return number(value, 5) if math.isfinite(value) else click.style(str(value), fg="red", bold=True)


def _delivery(status: DeliveryStatus) -> str:
    there = in_words(status.points_delivered, status.artifacts_delivered) or "nothing yet"
    waiting = in_words(status.points_waiting, len(status.artifacts_waiting))
    said = f"{there} delivered" + (f", {waiting} waiting" if waiting else "")
    if waiting and status.shipper is None:
        said += ", and nobody is at it"
    return said + (click.style(f"; {status.trouble}", fg="red") if status.trouble else "")


def spark(values: Sequence[float], width: int) -> str:
    """The values as a line of at most `width` characters, each the mean of some; ! where one is no number."""
    per = max(1, math.ceil(len(values) / width))
    groups = [values[at : at + per] for at in range(0, len(values), per)]
    means = [
        math.fsum(group) / len(group) if all(map(math.isfinite, group)) else math.nan for group in groups
    ]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return _ODD * len(means)
    least, most = min(finite), max(finite)
    step = (most - least) / (len(_SPARKS) - 1)
    return "".join(
        _ODD if not math.isfinite(mean) else _SPARKS[round((mean - least) / step) if step else 0]
        for mean in means
    )
