"""`interlock sync`: delivers what the tracking server has not got yet."""

import sys
from collections.abc import Iterator

import click

from orchestrator.commands.arguments import root_of, root_option, run_argument, timeout_option
from orchestrator.commands.layout import count
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
@root_option
@click.pass_context
def sync(ctx: click.Context, run: RunFolder | None, every: bool, timeout: float) -> None:
    """Deliver what MLflow has not got of RUN, or of every run.

    Waits until it is delivered. A training delivers its run by itself; this is for what was left when its
    machine was stopped, or the server was away. The exit status is 1 if something is left all the same.

    \b
    Example:
      interlock sync digits
      interlock sync --all --timeout 60
    """
    if (run is None) != every:
        raise click.UsageError("expected either a RUN or --all")
    runs = list(_tracked(list_runs(root_of(ctx)))) if run is None else [run]
    complete = [_sync(found, timeout, one_of_many=every) for found in runs]
    if not all(complete):
        sys.exit(1)
    if not runs:
        click.echo("there is no run to deliver", err=True)


def _tracked(runs: list[RunFolder]) -> Iterator[RunFolder]:
    """Those that are made with a tracker, and have no shipper at work already."""
    for run in runs:
        status = status_of(run)
        if status.shipper is not None:
            click.echo(f"{run.id}: {status.shipper} is delivering it")
        elif status.tracked:
            yield run


def _sync(run: RunFolder, timeout: float, *, one_of_many: bool) -> bool:
    """Deliver one run and say what came of it; is all delivered?"""
    try:
        report = deliver(run, timeout=timeout, progress=lambda line: _progress(run, line))
    except InterlockError as error:
        if not one_of_many:
            raise
        click.echo(f"Error: {error}", err=True)
        return False
    for line in _report(report):
        click.echo(f"{run.id}: {line}")
    return report.complete


def _progress(run: RunFolder, line: str) -> None:
    click.secho(mask_text(line), dim=True, err=True)


def _report(report: SyncReport) -> Iterator[str]:
    delivered = in_words(report.points_delivered, report.artifacts_delivered)
    yield f"delivered {delivered}" if delivered else "nothing was left to deliver"
    if report.points_left or report.artifacts_left:
        yield f"left: {in_words(report.points_left, len(report.artifacts_left))}"
    if report.trouble:
        yield click.style(mask_text(report.trouble), fg="red")
    seen = report.url or report.command
    if seen:
        yield f"see it {'at' if report.url else 'with'}: {mask_text(seen)}"


def in_words(points: int, artifacts: int) -> str:
    """'1,203 points and 2 artifacts', without what there is none of."""
    return " and ".join(
        count(amount, noun) for amount, noun in ((points, "point"), (artifacts, "artifact")) if amount
    )
