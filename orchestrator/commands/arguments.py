"""What commands take from the command line alike: RUN, --root, --json."""

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tracking.runs import RootError, RunFolder, find_run, list_runs

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "complete_run",
    "json_option",
    "output_option",
    "reference",
    "root_of",
    "root_option",
    "run_argument",
    "timeout_option",
]

_DEFAULT_ROOT = Path("runs")
_ROOT = "orchestrator.commands.root"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def root_of(ctx: click.Context) -> Path:
    """The folder of runs that was chosen, before the command's name or after it."""
    found = ctx.meta.get(_ROOT, _DEFAULT_ROOT)
    assert isinstance(found, Path)
    return found


def _keep_root(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.meta[_ROOT] = value  # shared with the commands below


def root_option(command: Decorated) -> Decorated:
    """`--root`, which both the group and each command have."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help=f"The folder that runs are in.  [default: {_DEFAULT_ROOT}]",
        callback=_keep_root,
        expose_value=False,
        is_eager=True,
    )(command)


def _find(ctx: click.Context, _: click.Parameter, value: str | None) -> RunFolder | None:
    return None if value is None else find_run(value, root_of(ctx))


def complete_run(ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """What a shell offers for RUN: names first, then ids, the newest first; folders after a slash."""
    from click.shell_completion import CompletionItem  # needed at a prompt only

    if "/" in incomplete:
        return [CompletionItem(incomplete, type="dir")]
    try:
        runs = list_runs(root_of(ctx))
    except RootError:
        return []
    names = Counter(run.name for run in runs)
    items = [
        CompletionItem(name, help="a run" if amount == 1 else f"the newest of {amount}")
        for name, amount in names.items()
    ]
    items += [CompletionItem(run.id) for run in runs]
    return [item for item in items if str(item.value).startswith(incomplete)]


def run_argument(name: str = "run", *, required: bool = True) -> Callable[[Decorated], Decorated]:
    """RUN, handed over as `run: RunFolder` or by another `name` (None where it is not required and not given).

    Raises RunNotFound, which lists what comes nearest.
    """
    return click.argument(
        name,
        metavar="RUN" if required else "[RUN]",
        callback=_find,
        required=required,
        shell_complete=complete_run,
    )


def json_option(command: Decorated) -> Decorated:
    """`--json`, handed over as `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def output_option(help_text: str, default: str | None = None) -> Callable[[Decorated], Decorated]:
    """`-o FILE`, handed over as `output: Path`, None where it is not given and there is no `default`."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        default=default,
        show_default=default is not None,
        help=help_text,
    )


def timeout_option(default: float) -> Callable[[Decorated], Decorated]:
    """`--timeout SECONDS` for what waits for a server."""
    return click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=default,
        metavar="SECONDS",
        help=f"How long a server that is away is tried again.  [default: {default:g}]",
    )


def reference(run: RunFolder, root: Path) -> str:
    """How to name this very run in a command typed in this folder, quoted for a shell."""
    if run.path == _DEFAULT_ROOT.resolve() / run.id:
        return shlex.quote(run.id)
    if run.path == root.resolve() / run.id:
        return shlex.quote(str(root / run.id))
    return shlex.quote(str(run.path))
