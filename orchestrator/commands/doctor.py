"""`interlock doctor`: what is wrong with this machine, or with a run, and what to do about it."""

from collections.abc import Iterable, Iterator

import click

from orchestrator.commands.arguments import json_option, reference, root_of, root_option, run_argument
from orchestrator.commands.environment import environment
from orchestrator.commands.layout import count, heading, padded, to_json
from orchestrator.commands.signs import Sign
from tracking.runs import RunFolder

__all__ = ["doctor"]

_MARKS = {
    "fine": click.style("ok   ", fg="green"),
    "note": click.style("note ", fg="yellow"),
    "wrong": click.style("WRONG", fg="red", bold=True),
}


@click.command()
@run_argument(required=False)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    metavar="SECONDS",
    help="How long the tracking server has to answer.  [default: 5]",
)
@json_option
@root_option
@click.pass_context
def doctor(ctx: click.Context, run: RunFolder | None, timeout: float, as_json: bool) -> None:
    """Say what is wrong with this machine, or with RUN, and what to do.

    Without a RUN: Python, torch and its device, what else is needed, threads, the disk and file system that runs are
    kept on, the clock, shared memory, and the tracking server. Of a RUN: its process, how it ended and how to go on,
    every hash of its files, what is not delivered and why. Changes nothing. The exit status is 0 if nothing is wrong
    (notes are no reason), 1 if something is.

    \b
    Example:
      interlock doctor
      interlock doctor digits
      interlock doctor --json | jq '.signs[] | select(.severity == "wrong")'
    """
    root = root_of(ctx)
    if run is None:
        about, found = "this machine", environment(root, timeout)
    else:
        from orchestrator.commands.health import health  # not needed for a machine's

        about, found = reference(run, root), health(run, root)
    if as_json:
        signs = list(found)
        wrong = sum(sign.severity == "wrong" for sign in signs)
        click.echo(to_json({"about": about, "wrong": wrong, "signs": signs}, indent=1))
    else:
        wrong = _print(about, found)
    ctx.exit(1 if wrong else 0)


def _print(about: str, found: Iterable[Sign]) -> int:
    """Each sign as soon as it is known; how many are wrong."""
    click.echo(heading(about))
    signs = []
    for sign in found:
        signs.append(sign)
        click.echo("\n".join(_lines(sign)))
    wrong, notes = (sum(sign.severity == severity for sign in signs) for severity in ("wrong", "note"))
    said = count(wrong, "thing") + " wrong" if wrong else "nothing is wrong"
    said += f", {count(notes, 'note')}" if notes else ""
    click.secho(said, fg="red" if wrong else "green", bold=bool(wrong))
    return wrong


def _lines(sign: Sign) -> Iterator[str]:
    yield f"  {_MARKS[sign.severity]}  {padded(sign.part, 13)} {sign.found}"
    for word, text in (("expected", sign.expected), ("to do", sign.do)):
        if text:
            yield f"         {padded('', 13)} {click.style(padded(word, 8), dim=True)} {text}"
