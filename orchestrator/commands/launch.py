"""`interlock launch`: a script, and the same again in a warm process whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.standing import standing_of
from states.errors import InterlockError
from tracking.journal import Journal
from tracking.runs import BEGUN_VARIABLE, RESUME_VARIABLE, RunFolder
from tracking.schema import newest_checkpoint

if TYPE_CHECKING:
    from orchestrator.forked_script import Script

__all__ = ["launch"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""By which somebody means that it is to stop."""
_LEFT = (75, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""With which `fit` leaves after `max_time` and signals."""
_PASSED_ON = (*_STOPPING, signal.SIGUSR1, signal.SIGUSR2)
_BY_THE_KERNEL = 0x80  # si_code SI_KERNEL: a key of the terminal, which the script gets as well


class LaunchError(InterlockError):
    """The script cannot be started."""


@dataclass(frozen=True, order=True)
class _Reached:
    """How far a process came: how many runs it began, and where the last of them stood."""

    runs: int = 0
    epoch: int = -1
    batch: int = -1

    def __str__(self) -> str:
        if not self.runs:
            return "before it began a run"
        if self.epoch < 0:
            return "before epoch 0"
        return f"at epoch {self.epoch}" + (f", batch {self.batch}" if self.batch >= 0 else "")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--tries",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Give up after so many starts in a row that came no further than one before.",
)
@click.option("--errors", is_flag=True, help="Start it again after an error of its own, too.")
@click.option("--cold", is_flag=True, help="Let each start import everything anew.")
@click.option(
    "--import", "also", metavar="MODULE", multiple=True, help="Import MODULE ahead, too. May be given again."
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module's name, as after python -m.")
@click.argument("script", metavar="SCRIPT", type=click.Path())
@click.argument("arguments", metavar="[ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def launch(
    ctx: click.Context,
    tries: int,
    errors: bool,
    cold: bool,
    also: tuple[str, ...],
    module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT as python does, and start it again whenever it is killed.

    It was killed if it ended by a signal that does not mean stop: out of memory, SIGKILL, a crash. The runs
    that it had begun are then gone on with from their newest checkpoints, whatever the script gives as
    `resume`, and those that are done are not trained again. After SIGTERM, Ctrl-C, max_time and errors it is
    not started again. The exit status is the script's.

    What SCRIPT imports at its top, and torch, is imported once, here, and SCRIPT is run in a fork: it trains
    again a fraction of a second after it was killed. Modules that lie beside it are imported anew each time.
    One process is looked after, not those of torchrun, which has --max-restarts.

    \b
    Example:
      interlock launch train.py --epochs 90
      interlock launch -m project.train
    """
    from orchestrator.forked_script import Script, cannot_fork, import_ahead

    what = Script(script, arguments, module)
    if not module and not Path(script).is_file():
        raise LaunchError(
            f"{script}: there is no such file; expected a script of Python, or a module's name after -m"
        )
    if not cold:
        try:
            import_ahead(what, also)
        except ImportError as error:
            raise LaunchError(f"--import: {error}; expected modules that can be imported here") from error
        if reason := cannot_fork(what):
            _say(f"{reason}: each start imports everything anew")
            cold = True
    ctx.exit(_keep_going(what, tries, errors, fork=not cold))


def _keep_going(script: Script, tries: int, errors: bool, *, fork: bool) -> int:
    """Start the script until it ends by itself, is stopped, or gets no further. The exit status."""
    from orchestrator.forked_script import start

    # Nothing here is undone when the stack is left: a fork leaves it as well, when the script ends.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_passed_on(), signal.SIGCHLD})
    file = Path(tempfile.mkdtemp(prefix="interlock-")) / "begun"
    known: list[RunFolder] = []
    best, in_vain = _Reached(), 0
    while True:
        environment = {**os.environ, BEGUN_VARIABLE: str(file)}
        if goes_on := [str(run.path) for run in known if newest_checkpoint(run.path) is not None]:
            environment[RESUME_VARIABLE] = "\n".join(goes_on)
        file.unlink(missing_ok=True)
        began = time.monotonic()
        process = start(script, environment, fork=fork)
        status, asked_to_stop = _wait(process)
        if asked_to_stop or not (_was_killed(status) or (errors and status > 0 and status not in _LEFT)):
            break
        begun = _begun(file)
        # It may have died before it came to all that is known.
        known = [*begun, *(run for run in known if run not in begun)]
        reached = _reached(begun)
        in_vain, best = (0, reached) if reached > best else (in_vain + 1, best)
        said = f"process {process} {_ended(status)} after {time.monotonic() - began:.1f} s, {reached}"
        if in_vain >= tries:
            _say(f"{said}; {in_vain} starts in a row came no further than one before: giving up")
            break
        _say(f"{said}; starting it again")
    shutil.rmtree(file.parent, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _passed_on() -> set[signal.Signals]:
    """What the script is told as well; not what is ignored here, as SIGHUP is after `nohup`."""
    return {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}


def _wait(process: int) -> tuple[int, bool]:
    """Wait for the end of `process`, handing signals on to it. How it ended, and whether it was asked to stop."""
    asked_to_stop = False
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), asked_to_stop
        came = signal.sigwaitinfo({*_passed_on(), signal.SIGCHLD})
        asked_to_stop = asked_to_stop or came.si_signo in _STOPPING
        if came.si_signo != signal.SIGCHLD and came.si_code != _BY_THE_KERNEL:
            # A group may have been meant, which the script is of: a second SIGINT would stop it unsaved.
            os.kill(process, signal.SIGTERM if came.si_signo == signal.SIGINT else came.si_signo)


def _was_killed(status: int) -> bool:
    return status < 0 and -status not in _STOPPING


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _begun(file: Path) -> list[RunFolder]:
    """The runs that a process began or went on with, in their order."""
    try:
        return [RunFolder(Path(line)) for line in file.read_text().splitlines()]
    except FileNotFoundError:
        return []


def _reached(runs: list[RunFolder]) -> _Reached:
    if not runs:
        return _Reached()
    try:
        with Journal.open(runs[-1]) as journal:
            place = standing_of(runs[-1], journal).place
    except InterlockError:
        return _Reached(len(runs))
    return _Reached(len(runs), place.epoch, place.batch)


def _say(text: str) -> None:
    if sys.stderr.isatty():  # where a live line may have been left, and no cursor
        click.echo("\x1b[?25h", err=True)
    click.echo(f"{click.style('interlock', dim=True)} {text}", err=True)
