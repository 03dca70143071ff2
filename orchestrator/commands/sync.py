"""`interlock sync`: delivers what the tracking server has not got yet."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import click

from orchestrator.commands.arguments import (
    json_option,
    root_of,
    root_option,
    run_argument,
    timeout_option,
)
from orchestrator.commands.layout import count, to_json
from states.errors import InterlockError
from tracking.masking import mask_text
from tracking.runs import RunFolder, list_runs
from tracking.shipper import SyncReport
from tracking.shipper import status as status_of
from tracking.shipper import sync as deliver

__all__ = ["in_words", "sync"]


@click.command()
@run_argument(required=False)
@click.option("--all", "every", is_flag=True, help="Every run that has something left to deliver.")
@timeout_option(600.0)
@json_option
@root_option
@click.pass_context
def sync(ctx: click.Context, run: RunFolder | None, every: bool, timeout: float, as_json: bool) -> None:
    """Deliver what MLflow has not got of RUN, or of every run.

    Waits until it is delivered. A training delivers its run by itself; this is for what was left when its
    machine was stopped, or the server was away. The exit status is 1 if something is left all the same. --json prints
    a list with an object for each run.

    \b
    Example:
      interlock sync digits
      interlock sync --all --timeout 60
    """
    if (run is None) != every:
        raise click.UsageError("expected either a RUN or --all")
    runs = list(_tracked(list_runs(root_of(ctx)), aside=as_json)) if run is None else [run]
    done = [_sync(found, timeout, one_of_many=every, silent=as_json) for found in runs]
    if as_json:
        click.echo(to_json(done, indent=1))
    elif not runs:
        click.echo("there is no run to deliver", err=True)
    if not all(one.complete for one in done):
        sys.exit(1)


@dataclass(frozen=True)
class _Done:
    """What came of a run; `error` where it could not be delivered at all. The keys of the JSON."""

    run: str
    complete: bool
    report: SyncReport | None
    error: str = ""


def _tracked(runs: list[RunFolder], *, aside: bool) -> Iterator[RunFolder]:
    """Those that are made with a tracker, and have no shipper at work already."""
    for run in runs:
        try:
            status = status_of(run)
        except InterlockError:
            yield run  # what is wrong with it is said when it is delivered
            continue
        if status.shipper is not None:
            click.echo(f"{run.id}: {status.shipper} is delivering it", err=aside)
        elif status.tracked:
            yield run


def _sync(run: RunFolder, timeout: float, *, one_of_many: bool, silent: bool) -> _Done:
    """Deliver one run and, unless `silent`, say what came of it."""
    try:
        report = deliver(run, timeout=timeout, progress=lambda line: _progress(run, line))
    except InterlockError as error:
        if not one_of_many:
            raise
        click.echo(f"Error: {error}", err=True)
        return _Done(run.id, False, None, str(error))
    report = replace(
        report,
        url=mask_text(report.url),
        command=mask_text(report.command),
        trouble=mask_text(report.trouble),
    )
    if not silent:
        for line in _report(report):
            click.echo(f"{run.id}: {line}")
    return _Done(run.id, report.complete, report)


def _progress(run: RunFolder, line: str) -> None:
    click.secho(mask_text(line), dim=True, err=True)


def _report(report: SyncReport) -> Iterator[str]:
    delivered = in_words(report.points_delivered, report.artifacts_delivered)
    left = report.points_left or report.artifacts_left
    nothing = "nothing was delivered" if left else "nothing was left to deliver"
    yield f"delivered {delivered}" if delivered else nothing
    if left:
        yield f"left: {in_words(report.points_left, len(report.artifacts_left))}"
    if report.trouble:
        yield click.style(report.trouble, fg="red")
    seen = report.url or report.command
    if seen:
        yield f"see it {'at' if report.url else 'with'}: {seen}"


def in_words(points: int, artifacts: int) -> str:
    """'1,203 points and 2 artifacts', without what there is none of."""
    return " and ".join(
        count(amount, noun) for amount, noun in ((points, "point"), (artifacts, "artifact")) if amount
    )
