"""`interlock resume`: the recorded command of a run, started again in its folder."""

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from orchestrator.commands.arguments import root_option, run_argument
from orchestrator.commands.standing import standing_of
from states.errors import InterlockError
from states.table import State
from tracking.journal import Journal
from tracking.runs import RESUME_VARIABLE, LeaseHeldError, RunFolder, lease_holder

__all__ = ["Command", "ResumeError", "read_command", "resume"]


class ResumeError(InterlockError):
    """The run cannot be started again from here."""


@dataclass(frozen=True)
class Command:
    """What started a run: the interpreter, the whole command line, the folder it was started in."""

    executable: str
    argv: tuple[str, ...]
    cwd: Path

    def __str__(self) -> str:
        return shlex.join(self.argv)


def read_command(run: RunFolder, by_hand: str = "", instead: str = "") -> Command:
    """The command that started the run, able to start it again.

    Raises ResumeError if none is recorded, or it cannot be started again here. The error says how to do it
    `by_hand`, with an environment variable, and what to call `instead` in a notebook; by default, to resume.
    """
    folder = str(run.path)
    by_hand = by_hand or f"{RESUME_VARIABLE}={shlex.quote(folder)}"
    instead = instead or f"trainer.fit(resume={folder!r})"
    command = _recorded(run, by_hand)
    notebook = any("ipykernel" in word for word in command.argv)
    if notebook or len(command.argv) < 2 or command.argv[1] == "-":
        raise ResumeError(
            f"{run.id}: was started from {'a notebook' if notebook else 'an interactive session'} "
            f"({command}), expected a script; go on there, with {instead}"
        )
    if not command.cwd.is_dir():
        raise ResumeError(
            f"{run.id}: was started in {command.cwd}, which is not there any more; expected that folder, "
            f"with the script in it. From another folder: {by_hand} {command}"
        )
    if not shutil.which(command.executable):
        raise ResumeError(
            f"{run.id}: was started with {command.executable}, which is not there any more; start it with "
            f"another interpreter: {by_hand} {command}"
        )
    return command


def _recorded(run: RunFolder, by_hand: str) -> Command:
    try:
        found: Any = json.loads(run.command.read_text())
        return Command(str(found["executable"]), tuple(map(str, found["argv"])), Path(found["cwd"]))
    except FileNotFoundError:
        problem = "there is none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"it cannot be read ({error})"
    raise ResumeError(
        f"{run.command}: expected the command that started the run, found that {problem}; start the script "
        f"yourself with {by_hand} in its environment"
    )


@click.command()
@run_argument()
@root_option
def resume(run: RunFolder) -> None:
    """Go on with RUN: start its recorded command again.

    It is started in the folder it was started in before, in place of this process, and goes on from its
    newest checkpoint that is whole, whatever its script gives as `resume`.

    \b
    Example:
      interlock resume digits
    """
    holder = lease_holder(run)
    if holder is not None:
        raise LeaseHeldError(
            f"{run.id}: is being trained by {holder}; expected nobody at work on it. "
            f"Read along with: interlock log {run.id} --follow"
        )
    with Journal.open(run) as journal:
        standing = standing_of(run, journal)
    if standing.state is State.DONE:
        raise ResumeError(
            f"{run.id}: is DONE, there is nothing left to do. To train it further, start its script with "
            f"more epochs and trainer.fit(resume={run.id!r})"
        )
    command = read_command(run)
    click.echo(
        f"{click.style('in', dim=True)} {command.cwd}\n{click.style('run', dim=True)} {command}", err=True
    )
    os.chdir(command.cwd)
    os.execvpe(command.executable, command.argv, {**os.environ, RESUME_VARIABLE: str(run.path)})
