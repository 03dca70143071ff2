"""`interlock log`: the transitions of a run, a line each, also while it goes on."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

import click

from orchestrator.commands.arguments import json_option, root_option, run_argument
from orchestrator.commands.layout import clock, date, duration, number, padded, to_json
from orchestrator.commands.standing import read_life
from states.table import ARCS, State, Trigger
from tracking.journal import TRAIN, Journal, Transition
from tracking.runs import RunFolder, lease_holder

__all__ = ["log"]

_POLL_S = 0.1
_PATIENCE_S = 0.3  # the journal is written every 0.25 s: after a longer silence the recorder is asked
_LONGEST_PAUSE_S = 2.0  # between two readings of the whole recorder, while nothing at all happens
_FOLLOW_FROM = 10


@dataclass(frozen=True)
class _Wanted:
    """Which transitions are asked for; None: all."""

    state: State | None
    epoch: int | None
    scope: str | None
    attempt: int | None
    superseded: bool

    def fits(self, found: Transition) -> bool:
        return (
            (self.superseded or not found.superseded)
            and (self.state is None or found.dest is self.state)
            and (self.epoch is None or found.epoch == self.epoch)
            and (self.scope is None or found.scope in (self.scope, f"validation/{self.scope}"))
            and (self.attempt is None or found.attempt == self.attempt)
        )


@click.command()
@run_argument()
@click.option(
    "--state",
    type=click.Choice([state.value for state in State], case_sensitive=False),
    metavar="STATE",
    help="Only transitions that reach this state.",
)
@click.option("--epoch", type=click.IntRange(-1), metavar="N", help="Only epoch N, counted from 0.")
@click.option("--scope", metavar="SCOPE", help="Only `train`, or the validation of this name.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="Only attempt N, counted from 1.")
@click.option("--all", "superseded", is_flag=True, help="Also what a later attempt went back behind.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N that fit.")
@click.option(
    "-f", "--follow", is_flag=True, help=f"Read along; begins with the last {_FOLLOW_FROM} without --tail."
)
@json_option
@root_option
def log(
    run: RunFolder,
    state: str | None,
    epoch: int | None,
    scope: str | None,
    attempt: int | None,
    superseded: bool,
    tail: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Print the transitions of RUN, a line each.

    The newest come from the flight recorder, so that the log is complete after a SIGKILL. --follow reads
    along and ends with the training, or at Ctrl-C. --json prints one object a line, with the columns of
    the journal's view `transitions`.

    \b
    Example:
      interlock log digits --epoch 2 --state STEP
      interlock log digits --follow
      interlock log digits --json | jq 'select(.loss > 2)'
    """
    wanted = _Wanted(State(state) if state else None, epoch, scope, attempt, superseded)
    with Journal.open(run) as journal:
        if follow and tail is None:
            tail = _FOLLOW_FROM
        reading = _Reading(run, journal, wanted)
        found = reading.all() if tail is None else reading.last(tail)
        if follow:
            found = reading.and_on(found)
        elif {state, epoch, scope, attempt} != {
            None
        }:  # a log that is empty since nothing has begun is no mistake
            first = list(islice(found, 1))
            found = chain(first, found)
            if not first:
                click.echo(
                    f"{run.id} has no such transition; `interlock show {run.id}` says how far it goes",
                    err=True,
                )
        _write(map(to_json, found) if as_json else _lines(found), lines_at_once=1 if follow else 1000)
        if follow and read_life(run, journal).died:
            click.echo(f"the process died; `interlock check {run.id}` writes down its end", err=True)


class _Reading:
    """Reads transitions in the order of seq. Invariant: everything up to `after` has been read."""

    def __init__(self, run: RunFolder, journal: Journal, wanted: _Wanted):
        self._run = run
        self._journal = journal
        self._wanted = wanted
        self._after = 0

    def all(self) -> Iterator[Transition]:
        """All that fit, the newest from the flight recorder; of one epoch, only what is of it is read."""
        found = self._journal.transitions(
            epoch=self._wanted.epoch, include_superseded=self._wanted.superseded, live=True
        )
        return filter(self._wanted.fits, found)

    def last(self, amount: int) -> Iterator[Transition]:
        """The last `amount` that fit: looked for backwards, in stretches that grow."""
        newest, stretch = self._journal.newest_seq(), 4 * amount + 1000
        while True:
            self._after = max(newest - stretch, 0)
            at_start = self._after == 0
            found = deque(self._next(live=True), maxlen=amount)
            if len(found) == amount or at_start:
                return iter(found)
            stretch *= 8

    def and_on(self, found: Iterable[Transition]) -> Iterator[Transition]:
        """`found`, then what is recorded until the training's process is gone."""
        yield from found
        quiet_since = asked_at = time.monotonic()
        pause = _PATIENCE_S
        while True:
            # Asked before reading: what it recorded before it left is then in what is read.
            over = lease_holder(self._run) is None
            now = time.monotonic()
            ask_recorder = now - quiet_since >= _PATIENCE_S and now - asked_at >= pause
            before = self._after
            yield from self._next(live=over or ask_recorder)
            if over:
                return
            if ask_recorder:
                asked_at, pause = now, min(2 * pause, _LONGEST_PAUSE_S)
            if self._after > before:
                quiet_since, pause = time.monotonic(), _PATIENCE_S
            time.sleep(_POLL_S)

    def _next(self, *, live: bool) -> Iterator[Transition]:
        superseded = self._wanted.superseded
        for found in self._journal.transitions(after=self._after, include_superseded=superseded, live=live):
            self._after = found.seq  # of each, wanted or not
            if self._wanted.fits(found):
                yield found


def _write(lines: Iterator[str], *, lines_at_once: int) -> None:
    while block := list(islice(lines, lines_at_once)):
        click.echo("\n".join(block))


_MOVES = max(len(str(arc)) for arc in ARCS)


def _lines(transitions: Iterable[Transition]) -> Iterator[str]:
    day, second = "", -1
    for found in transitions:
        if found.time_ns // 1_000_000_000 == second:
            yield _line(found)
            continue
        second = found.time_ns // 1_000_000_000
        today = date(found.time_ns)[:10]
        if today != day:  # the times below are of this day
            day = today
            yield _dim(
                _columns("seq", day, "epoch", "batch", "", "transition".ljust(_MOVES), "took", "loss", "")
            )
        yield _line(found)


def _line(found: Transition) -> str:
    return _columns(
        str(found.seq),
        clock(found.time_ns),
        "" if found.epoch < 0 else str(found.epoch),
        "" if found.batch < 0 else str(found.batch),
        found.phase if found.scope == TRAIN else found.scope.removeprefix("validation/"),
        _move(found.trigger, found.source, found.dest),
        duration(found.duration_ns),
        "" if found.loss is None else number(found.loss),
        f"{_dim('superseded')} {found.note}" if found.superseded else found.note,
    )


@cache
def _move(trigger: Trigger, source: State, dest: State) -> str:
    reached = click.style(dest.value, bold=True, fg=_COLOURS.get(dest))
    return padded(f"{source.value} → {reached} {_dim(f'({trigger.value})')}", _MOVES)


def _columns(
    seq: str, when: str, epoch: str, batch: str, part: str, move: str, took: str, loss: str, note: str
) -> str:
    return (
        f"{seq:>7} {when:<12} {epoch:>5} {batch:>5} {padded(part, 4)} {move} {took:>7} {loss:>8}  {note}"
    ).rstrip()


_COLOURS = {State.EPOCH_START: "cyan", State.EPOCH_END: "cyan", State.DONE: "green", State.HALTED: "yellow"}


def _dim(text: str) -> str:
    return click.style(text, dim=True)
