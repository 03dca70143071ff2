"""`interlock blame`: what made a loss or gradient of a run NaN or infinite."""

import click

from orchestrator.commands.arguments import root_option, run_argument
from orchestrator.commands.sending import epoch_and_batch, send
from orchestrator.errands import Errand
from tracking.runs import RunFolder

__all__ = ["blame"]


@click.command()
@run_argument()
@epoch_and_batch
@root_option
@click.pass_context
def blame(ctx: click.Context, run: RunFolder, epoch: int | None, batch: int | None) -> None:
    """Name what made a loss or gradient of RUN NaN or infinite.

    Starts the recorded command of RUN; where its trainer would start, the guilty batch is done again from the nearest
    checkpoint, every module and function watched. Says which parameter, data, module or loss function it was, the
    function of torch, and the line that called it. By default the batch is the newest that RUN halted on or skipped.

    \b
    Example:
      interlock blame digits
      interlock blame digits --epoch 2 --batch 40
    """
    if (epoch is None) != (batch is None):
        raise click.UsageError("expected both --epoch and --batch, or neither")
    errand = Errand("blame", str(run.path), epoch=epoch, batch=batch)
    ctx.exit(send(run, errand, f"trainer.blame(run={str(run.path)!r})"))
