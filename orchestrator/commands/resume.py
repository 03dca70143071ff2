"""`interlock resume`: the recorded command of a run, started again in its folder."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from orchestrator.commands.arguments import complete_run, root_of, root_option, timeout_option
from orchestrator.commands.standing import standing_of
from states.errors import InterlockError
from states.table import State
from tracking.fetching import is_reference
from tracking.journal import Journal
from tracking.masking import MASK
from tracking.runs import RESUME_VARIABLE, LeaseHeldError, RunFolder, find_run, lease_holder

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


def _find(ctx: click.Context, _: click.Parameter, value: str) -> RunFolder | str:
    return value if is_reference(value) else find_run(value, root_of(ctx))


@click.command()
@click.argument("run", metavar="RUN", callback=_find, shell_complete=complete_run)
@click.option(
    "--tracking-uri",
    metavar="URI",
    help="Where MLflow is, for mlflow:RUN_ID.  [default: MLFLOW_TRACKING_URI, or the local store]",
)
@timeout_option(60.0)
@root_option
@click.pass_context
def resume(ctx: click.Context, run: RunFolder | str, tracking_uri: str | None, timeout: float) -> None:
    """Go on with RUN: start its recorded command again.

    It is started in the folder it was started in before, in place of this process, and goes on from its
    newest checkpoint that is whole, whatever its script gives as `resume`.

    mlflow:RUN_ID is a run that MLflow has, made on any machine: its journal and its newest checkpoint are
    downloaded (mlflow:RUN_ID@best, @epoch=2 or @epoch=2,batch=113: another checkpoint), and its command is
    started in this folder if the one it was started in is not here. The exit status is the command's.

    \b
    Example:
      interlock resume digits
      interlock resume mlflow:0f3c9c1d5e6f4b7a8d9e0f1a2b3c4d5e
    """
    environment = dict(os.environ)
    if tracking_uri is not None:
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    if isinstance(run, RunFolder):
        _check_open(run)
        command, environment[RESUME_VARIABLE] = read_command(run), str(run.path)
    else:
        command, environment[RESUME_VARIABLE] = _fetched(run, tracking_uri, root_of(ctx), timeout)
    click.echo(
        f"{click.style('in', dim=True)} {command.cwd}\n{click.style('run', dim=True)} {command}", err=True
    )
    os.chdir(command.cwd)
    os.execvpe(command.executable, command.argv, environment)


def _fetched(reference: str, uri: str | None, root: Path, timeout: float) -> tuple[Command, str]:
    """The command of a run at a server, and the folder or checkpoint here that it goes on from."""
    from orchestrator.retrieval import retrieve  # needs torch, slow to import
    from tracking.mlflow_delivery import MLflow

    found = retrieve(
        reference, MLflow(tracking_uri=uri), root, say=lambda text: click.echo(text, err=True), wait_s=timeout
    )
    _check_open(found.run)
    here = str(found.checkpoint or found.run.path)
    if found.run.command.exists():
        return read_command(found.run), here
    return _uploaded_command(found.run, here), here


def _uploaded_command(run: RunFolder, here: str) -> Command:
    """The command in the journal that was uploaded, fit for this machine. Raises ResumeError, saying what it needs."""
    by_hand = f"{RESUME_VARIABLE}={shlex.quote(here)}"
    with Journal.open(run) as journal:
        recorded: Any = journal.attempts()[0].command
    try:
        argv = tuple(map(str, recorded["argv"]))
        executable, cwd = str(recorded["executable"]), Path(recorded["cwd"])
    except (KeyError, TypeError) as error:
        raise ResumeError(
            f"{run.id}: its journal names no command; start its script yourself with {by_hand} in its environment"
        ) from error
    if any(MASK in word for word in argv):
        raise ResumeError(
            f"{run.id}: was started with secrets, which stayed on that machine; expected them from you. Start it "
            f"yourself, with {MASK} filled in: {by_hand} {shlex.join(argv)}"
        )
    # What a server gives is started with an interpreter of this machine, and must be a script that is here.
    if not (Path(executable).name.startswith("python") and shutil.which(executable)):
        executable = sys.executable
    argv = (executable, *argv[1:])
    script = _script(argv[1:])
    folders = [folder for folder in (cwd, Path.cwd()) if script and (folder / script).is_file()]
    if not folders:
        raise ResumeError(
            f"{run.id}: was started by {shlex.join(argv)} in {cwd}; expected {script or 'a script'} there or in this "
            f"folder. Go to where the script is, and: {by_hand} {shlex.join(argv)}"
        )
    return Command(executable, argv, folders[0])


def _script(words: Sequence[str]) -> str | None:
    """The script among the arguments of a Python interpreter; None where there is code, a module, or nothing."""
    after = ""
    for word in words:
        if word in ("-c", "-m", "-"):
            return None
        if not word.startswith("-") and after not in ("-X", "-W"):
            return word
        after = word
    return None


def _check_open(run: RunFolder) -> None:
    """Raise LeaseHeldError or ResumeError if the run is being trained, or done."""
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
