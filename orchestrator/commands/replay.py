"""`interlock replay`: a stretch of a run done again with the hooks of a script."""

from pathlib import Path

import click

from orchestrator.commands.arguments import root_option, run_argument
from orchestrator.commands.sending import PLACE, send
from orchestrator.errands import Errand
from tracking.runs import RunFolder

__all__ = ["replay"]


@click.command()
@run_argument()
@click.argument(
    "script",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    metavar="SCRIPT",
)
@click.option("--first", type=PLACE, metavar="E[:B]", help="Where to begin.  [default: the first epoch]")
@click.option(
    "--last", type=PLACE, metavar="E[:B]", help="Where to end, included.  [default: the last complete epoch]"
)
@root_option
@click.pass_context
def replay(
    ctx: click.Context,
    run: RunFolder,
    script: Path,
    first: tuple[int, int | None] | None,
    last: tuple[int, int | None] | None,
) -> None:
    """Ask RUN what was not recorded: do a stretch of it again with the hooks of SCRIPT.

    Starts the recorded command of RUN; where its trainer would start, the stretch is done again from the nearest
    checkpoint, each loss compared with the recorded one. SCRIPT is executed where the stretch begins, with
    `trainer`, `State` and `Trigger`: it adds hooks, such as @trainer.after(Trigger.BACKWARD), and may define
    `callbacks`, a list, and `done()`, which is called where the stretch ends. RUN is not changed.

    \b
    Example:
      interlock replay digits gradients.py
      interlock replay digits gradients.py --first 2:40 --last 2:60
    """
    errand = Errand("replay", str(run.path), first=first, last=last, script=str(script))
    ctx.exit(send(run, errand, f"trainer.replay(first, last, callbacks, run={str(run.path)!r})"))
