"""Starting a run's recorded command with an errand: what `seek`, `replay` and `blame` have in common."""

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.commands.resume import read_command
from orchestrator.errands import ERRAND_VARIABLE, Errand
from tracking.runs import RunFolder

__all__ = ["PLACE", "epoch_and_batch", "send"]

_NOT_BEGUN = 2

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def epoch_and_batch(command: Decorated) -> Decorated:
    """`--epoch` and `--batch`, counted from 0."""
    batch = click.option("--batch", type=click.IntRange(0), metavar="B", help="The batch within the epoch.")
    epoch = click.option("--epoch", type=click.IntRange(0), metavar="E", help="The epoch, counted from 0.")
    return epoch(batch(command))


class _Place(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """`E` or `E:B`: an epoch, or a batch of it."""

    name = "place"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        epoch, colon, batch = str(value).partition(":")
        if not epoch.isdecimal() or (colon and not batch.isdecimal()):
            self.fail(
                f"{value!r}: expected an epoch, such as 2, or epoch and batch, such as 2:113", param, ctx
            )
        return int(epoch), int(batch) if colon else None


PLACE = _Place()
"""`E` or `E:B`."""


def send(run: RunFolder, errand: Errand, instead: str) -> int:
    """Start the recorded command of the run with an errand, and wait for it; the exit status to leave with.

    `instead` is what can be called in a notebook. Raises ResumeError where the command cannot be started again.
    """
    command = read_command(run, f"{ERRAND_VARIABLE}={shlex.quote(errand.to_json())}", instead)
    with tempfile.TemporaryDirectory(prefix="interlock-") as folder:
        begun = Path(folder) / "begun"
        told = replace(errand, begun=str(begun)).to_json()
        with _interrupts_are_the_child_s():
            child = subprocess.Popen(
                command.argv,
                executable=command.executable,
                cwd=command.cwd,
                env={**os.environ, ERRAND_VARIABLE: told},
            )
            status = child.wait()
        if begun.exists():
            return status if status >= 0 else 128 - status
    click.echo(
        f"Error: {command} ended with status {status} before a trainer of a run named {run.name!r} had started; "
        f"expected it to call fit(), start() or advance() on one, in {command.cwd}",
        err=True,
    )
    return _NOT_BEGUN


@contextmanager
def _interrupts_are_the_child_s() -> Iterator[None]:
    """A terminal sends Ctrl-C to parent and child alike; the child knows what to do about it."""
    # Not SIG_IGN, which the child would inherit.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
