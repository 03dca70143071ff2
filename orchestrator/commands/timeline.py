"""`interlock timeline`: the page that shows where the time of a run went."""

from pathlib import Path

import click

from orchestrator.commands.arguments import output_option, root_option, run_argument
from tracking.runs import RunFolder
from tracking.timeline import write_timeline

__all__ = ["timeline"]


@click.command()
@run_argument()
@output_option("Where to.", default="timeline.html")
@root_option
def timeline(run: RunFolder, output: Path) -> None:
    """Write a page that shows where the time of RUN went.

    Totals, epoch by epoch, and transition by transition in a trace to zoom into, with losses, halts, resumes, skipped
    steps and what was done again. The page needs no network. Of a long run it has single transitions for the
    newest, the first, the slowest and those around events.

    \b
    Example:
      interlock timeline digits
      interlock timeline digits -o digits.html
    """
    try:
        write_timeline(run, output)
    except OSError as error:
        raise click.ClickException(f"{output}: cannot be written ({error.strerror})") from error
    click.echo(f"written: {output}", err=True)
