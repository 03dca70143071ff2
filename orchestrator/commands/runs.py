"""`interlock runs`: the runs of a folder at a glance."""

import time
from dataclasses import dataclass
from pathlib import Path

import click

from orchestrator.commands.arguments import json_option, root_of, root_option
from orchestrator.commands.layout import age, number, table, to_json
from orchestrator.commands.standing import Origin, Standing, newest_metrics, origin_of, standing_of
from states.table import State
from tracking.journal import TRAIN, Journal, JournalError, Outcome, RunInfo
from tracking.runs import RunFolder, list_runs

__all__ = ["label", "runs"]


@dataclass(frozen=True)
class _Line:
    """What is told of one run; these are the keys of the JSON, too. Times in nanoseconds since 1970."""

    id: str
    name: str
    folder: Path
    kind: str
    state: State | None
    outcome: Outcome | None
    attempts: int
    epochs: int
    batches: int | None
    loss: float | None
    validation: str
    validation_value: float | None
    created_ns: int | None
    origin: Origin | None
    problem: str
    shown: str


@click.command()
@root_option
@json_option
@click.pass_context
def runs(ctx: click.Context, as_json: bool) -> None:
    """List the runs, newest first.

    STATE is where the training stands: the live state of one that is running, DONE, HALTED (with how that
    came), or `died` where a process ended without a word. EPOCHS and BATCHES are those completed, LOSS is
    the newest batch's, VALIDATION the newest validation's, ORIGIN the run that one was branched from, or took
    its first weights from.

    \b
    Example:
      interlock runs
      interlock --root /data/runs runs --json
    """
    lines = [_line(run) for run in list_runs(root_of(ctx))]
    if as_json:
        click.echo(
            to_json([{k: v for k, v in vars(line).items() if k != "shown"} for line in lines], indent=1)
        )
    elif lines:
        header = ["RUN", "STATE", "ATTEMPTS", "EPOCHS", "BATCHES", "LOSS", "VALIDATION", "BEGUN", "ORIGIN"]
        columns = len(header) if any(line.origin for line in lines) else len(header) - 1
        rows = (_cells(line)[:columns] for line in lines)
        for text in table(header[:columns], rows, right="llrrrrlr"):
            click.echo(text)
    else:
        click.echo(f"There are no runs in {root_of(ctx)} yet. A training makes one: trainer.fit()", err=True)


def _line(run: RunFolder) -> _Line:
    try:
        with Journal.open(run) as journal:
            info = journal.run_info()
            return _of_standing(run, standing_of(run, journal), info)
    except JournalError as error:
        shown = click.style("unreadable", fg="red")
        return _Line(
            *(run.id, run.name, run.path, "unreadable", None, None, 0, 0, None, None, "", None, None, None),
            problem=str(error),
            shown=shown,
        )


def _of_standing(run: RunFolder, standing: Standing, info: RunInfo) -> _Line:
    key, value = _validation(run)
    attempts = standing.life.attempts
    return _Line(
        id=run.id,
        name=run.name,
        folder=run.path,
        kind=standing.kind,
        state=standing.state,
        outcome=attempts[-1].outcome if attempts else None,
        attempts=len(attempts),
        epochs=standing.epochs,
        batches=standing.batches,
        loss=standing.loss,
        validation=key,
        validation_value=value,
        created_ns=info.created_ns,
        origin=origin_of(run, info.parent),
        problem="",
        shown=label(standing),
    )


def label(standing: Standing) -> str:
    """The state in a word or two, coloured."""
    match standing.kind:
        case "new":
            return click.style("new", dim=True)
        case "running":
            return click.style(standing.state.value, fg="green", bold=True)
        case "died":
            return click.style("died", fg="red")
        case "ended":
            outcome = standing.life.attempts[-1].outcome
            if standing.state is State.DONE:
                return click.style("DONE", fg="green")
            return click.style(
                f"{standing.state.value}, {outcome}", fg="yellow" if outcome == "stopped" else "red"
            )


def _validation(run: RunFolder) -> tuple[str, float | None]:
    """The newest value of a validation: of the first metric that is not the loss, if there is one."""
    for measured in newest_metrics(run):
        if measured.scope != TRAIN and measured.values:
            key = next((key for key in measured.values if key != "loss"), "loss")
            return f"{measured.scope.removeprefix('validation/')}/{key}", measured.values.get(key)
    return "", None


def _cells(line: _Line) -> list[str]:
    return [
        line.id,
        line.shown,
        str(line.attempts),
        str(line.epochs),
        "-" if line.batches is None else f"{line.batches:,}",
        number(line.loss, 4),
        f"{line.validation} {number(line.validation_value, 4)}" if line.validation else "-",
        age(time.time_ns() - line.created_ns) if line.created_ns else "-",
        str(line.origin or ""),
    ]
