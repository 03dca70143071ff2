"""The `interlock` command: the group, its global options, how errors are said. Commands: `commands/`."""

import io
import os
import sqlite3
import sys
from difflib import get_close_matches
from importlib import import_module

import click

from orchestrator.commands.arguments import root_option
from states.errors import InterlockError

__all__ = ["main"]

_COMMANDS = {
    "launch": "orchestrator.commands.launch",
    "runs": "orchestrator.commands.runs",
    "show": "orchestrator.commands.show",
    "watch": "orchestrator.commands.watch",
    "log": "orchestrator.commands.log",
    "check": "orchestrator.commands.check",
    "diff": "orchestrator.commands.diff",
    "diagram": "orchestrator.commands.diagram",
    "timeline": "orchestrator.commands.timeline",
    "curves": "orchestrator.commands.curves",
    "resume": "orchestrator.commands.resume",
    "seek": "orchestrator.commands.seek",
    "replay": "orchestrator.commands.replay",
    "blame": "orchestrator.commands.blame",
    "sync": "orchestrator.commands.sync",
    "doctor": "orchestrator.commands.doctor",
}


class _Commands(click.Group):
    """Imports a command's module when the command is asked for, and says errors in one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named; one that there is not is said with those that there are."""
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], _COMMANDS, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{meant} Expected one of {', '.join(_COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(
                    errors="replace"
                )  # an arrow is no reason to fail where only ASCII is written
        try:
            return super().invoke(ctx)
        except InterlockError as error:
            raise click.ClickException(str(error)) from error
        except sqlite3.Error as error:
            raise click.ClickException(
                f"an SQLite file of the run cannot be read ({error}); `interlock check RUN` says more"
            ) from error
        except KeyboardInterrupt:
            ctx.exit(130)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        click.echo(f"interlock {version('interlock')}")
    except PackageNotFoundError:
        click.echo("interlock, from source files that are not installed")
    ctx.exit()


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A RUN is a run's id, a name (its newest run is meant), or the path of a run's folder.",
)
@root_option
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def main() -> None:
    """Look at training runs, prove that they are sound, and go on with them.

    \b
    Example:
      interlock runs
      interlock show digits
      interlock watch digits
    """


if __name__ == "__main__":
    main(prog_name="interlock")
