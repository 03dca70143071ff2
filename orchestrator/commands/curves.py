"""`interlock curves`: the values that a run logged, drawn."""

from pathlib import Path

import click

from orchestrator.commands.arguments import json_option, output_option, root_option, run_argument
from orchestrator.commands.layout import to_json
from tracking.curves import curves as read_curves
from tracking.curves import resumes, write_curves
from tracking.runs import RunFolder

__all__ = ["curves"]


@click.command()
@run_argument()
@output_option("Where to: .png, .svg or .pdf.", default="curves.png")
@json_option
@root_option
def curves(run: RunFolder, output: Path, as_json: bool) -> None:
    """Draw what RUN logged: losses, metrics, learning rate, times, a panel for each.

    Batches (mean and range), epochs and validations over the batches since the beginning. Broken lines mark resumes,
    crosses at the lower edge values that are not finite. --json prints the points instead, at most 600 a curve.

    \b
    Example:
      interlock curves digits
      interlock curves digits -o digits.svg
    """
    if as_json:
        click.echo(to_json({"run": run.id, "resumes": resumes(run), "curves": read_curves(run)}))
        return
    try:
        write_curves(run, output)
    except ImportError as error:
        raise click.ClickException(
            f"curves are drawn by matplotlib: {error}; pip install matplotlib"
        ) from error
    except ValueError as error:
        raise click.ClickException(
            f"{output}: expected a name that ends in .png, .svg or .pdf ({error})"
        ) from error
    except OSError as error:
        raise click.ClickException(f"{output}: cannot be written ({error.strerror})") from error
    click.echo(f"drawn: {output}", err=True)
