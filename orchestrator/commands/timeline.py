"""`interlock timeline`: where the time of a run went, as a page, and as a trace for Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from orchestrator.commands.arguments import json_option, output_option, root_option, run_argument
from orchestrator.commands.layout import count, to_json
from tracking.runs import RunFolder
from tracking.timeline import write_timeline
from tracking.trace import write_trace

__all__ = ["timeline"]

_PAGE = Path("timeline.html")


class _Epochs(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """`E` or `E-E`: an epoch, or from one to another."""

    name = "epochs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, dash, last = str(value).partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            self.fail(f"{value!r}: expected an epoch, such as 2, or epochs, such as 2-5", param, ctx)
        return range(int(first), int(last if dash else first) + 1)


@click.command()
@run_argument()
@output_option(f"Where the page goes.  [default: {_PAGE}, unless there is --trace]")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a trace for ui.perfetto.dev or chrome://tracing: FILE.json, or FILE.json.gz.",
)
@click.option(
    "--epoch",
    "epochs",
    type=_Epochs(),
    metavar="E[-E]",
    help="Only these epochs in the trace, counted from 0.",
)
@json_option
@root_option
def timeline(
    run: RunFolder, output: Path | None, trace: Path | None, epochs: range | None, as_json: bool
) -> None:
    """Write a page that shows where the time of RUN went.

    Totals, epoch by epoch, and transition by transition in a trace to zoom into, with losses, halts, resumes, skipped
    steps and what was done again. The page needs no network. Of a long run it has single transitions for the
    newest, the first, the slowest and those around events; a file of --trace has all of them, or all of some epochs.

    \b
    Example:
      interlock timeline digits
      interlock timeline digits -o digits.html
      interlock timeline digits --trace digits.json.gz --epoch 2-4
    """
    if epochs is not None and trace is None:
        raise click.UsageError("--epoch is for --trace; the page has all epochs")
    written: dict[str, Any] = {"run": run.id}
    if output is not None or trace is None:
        page = output or _PAGE
        with _explained(page):
            write_timeline(run, page)
        written["page"] = page
        if not as_json:
            click.echo(f"written: {page}", err=True)
    if trace is not None:
        with _explained(trace):
            events = write_trace(run, trace, epochs)
        written |= {"trace": trace, "events": events}
        if not as_json:
            click.echo(
                f"written: {trace}, {count(events, 'event')}; open it in https://ui.perfetto.dev", err=True
            )
    if as_json:
        click.echo(to_json(written, indent=1))


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be written ({error.strerror})") from error
