"""`interlock seek`: a Python prompt, or a script, with the trainer standing at a moment of a run."""

from pathlib import Path

import click

from orchestrator.commands.arguments import root_option, run_argument
from orchestrator.commands.sending import epoch_and_batch, send
from orchestrator.errands import Errand
from states.table import TERMINAL, State
from tracking.runs import RunFolder

__all__ = ["seek"]


@click.command()
@run_argument()
@epoch_and_batch
@click.option(
    "--state",
    type=click.Choice([state.value for state in State if state not in TERMINAL], case_sensitive=False),
    metavar="STATE",
    help="The state to stand in.  [default: BATCH_START, or EPOCH_START without --batch]",
)
@click.option("--phase", metavar="NAME", help="The phase that is meant, where batches have several.")
@click.option(
    "--run-script",
    "script",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    metavar="FILE",
    help="Run this file there, instead of a prompt.",
)
@root_option
@click.pass_context
def seek(
    ctx: click.Context,
    run: RunFolder,
    epoch: int | None,
    batch: int | None,
    state: str | None,
    phase: str | None,
    script: Path | None,
) -> None:
    """Stand at a moment of RUN again, bit for bit.

    Starts the recorded command of RUN; where its trainer would start, it goes back instead: to the nearest
    checkpoint, and from there on by doing the batches again, each loss compared with the recorded one. Then opens a
    Python prompt with `trainer`, `model`, `batch`, `State` and `Trigger`; code that comes by a pipe is run instead.
    RUN is not changed: to go on from there begins a new run.

    \b
    Example:
      interlock seek digits --epoch 2 --batch 40 --state BACKWARD
      echo 'print(trainer.metrics)' | interlock seek digits --epoch 2 --batch 40 --state FORWARD
    """
    if epoch is None and state != State.IDLE.value:
        raise click.UsageError("expected --epoch, or --state IDLE for the very beginning")
    errand = Errand(
        "seek",
        str(run.path),
        epoch=epoch,
        batch=batch,
        state=state,
        phase=phase,
        script=None if script is None else str(script),
    )
    ctx.exit(send(run, errand, f"trainer.seek(epoch, batch, state, run={str(run.path)!r})"))
