"""`interlock diagram`: the machine drawn, with how often and how long of a run."""

from pathlib import Path
from typing import Any

import click

from orchestrator.commands.arguments import json_option, output_option, root_option, run_argument
from orchestrator.commands.layout import to_json
from states.diagram import mermaid, svg
from states.table import TRAINING, Arc, arcs
from tracking.runs import RunFolder
from tracking.tally import tally

__all__ = ["diagram"]

_DRAWN = {"svg": svg, "mermaid": mermaid}
_ENDINGS = {".mmd": "mermaid", ".mermaid": "mermaid", ".md": "mermaid"}


@click.command()
@run_argument(required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(_DRAWN)),
    help="Default: mermaid for a FILE that ends in .mmd, .mermaid or .md, else svg.",
)
@output_option("Where to, instead of standard output.")
@json_option
@root_option
def diagram(run: RunFolder | None, form: str | None, output: Path | None, as_json: bool) -> None:
    """Draw the states of a training and its transitions.

    With a RUN, each transition shows how often it was made and how long it took on average; what was
    superseded by a resume does not count. --json has the same numbers: `count`, and `mean_ns` in nanoseconds.

    \b
    Example:
      interlock diagram -o machine.svg
      interlock diagram digits --format mermaid
    """
    if form is None:
        form = _ENDINGS.get(output.suffix, "svg") if output else "svg"
    numbers = None if run is None else tally(run).of_training()
    if as_json:
        text = to_json([_values(arc, numbers) for arc in arcs(TRAINING)], indent=1) + "\n"
    else:
        draw = _DRAWN[form]
        text = draw(TRAINING) if numbers is None else draw(TRAINING, *numbers)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output}: cannot be written ({error.strerror})") from error
    click.echo(f"drawn: {output}", err=True)


def _values(arc: Arc, numbers: tuple[dict[Arc, int], dict[Arc, float]] | None) -> dict[str, Any]:
    made = {"trigger": arc.trigger, "source": arc.source, "dest": arc.dest}
    if numbers is None:
        return made
    counts, means = numbers
    return {**made, "count": counts.get(arc, 0), "mean_ns": means.get(arc)}
