"""A run at a tracking server made a run of this machine again: its journal, and the checkpoint that is asked for."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from orchestrator.snapshot.storage import (
    CheckpointDamaged,
    CheckpointFormatError,
    parse_checkpoint_name,
    verify_checkpoint,
)
from orchestrator.warning import warn
from states.table import State
from tracking.delivery import CHECKPOINTS, Tracker
from tracking.fetching import (
    Fetched,
    FetchError,
    Reference,
    RemoteFiles,
    Seen,
    choose,
    keep_fetched,
    parse_reference,
)
from tracking.journal import Checkpoint, Journal, JournalError
from tracking.journal_copy import JOURNAL, forget_checkpoints, journal_from_copy
from tracking.mlflow_delivery import MLflow
from tracking.runs import RootError, RunFolder

__all__ = ["Retrieved", "retrieve"]


@dataclass(frozen=True)
class Retrieved:
    """The run's folder on this machine; `checkpoint` is the one to go on from, None for its newest."""

    run: RunFolder
    checkpoint: Path | None
    new: bool
    """The folder was made now."""


def retrieve(
    reference: str,
    tracker: Tracker | None,
    root: Path,
    *,
    say: Callable[[str], None] = warn,
    wait_s: float | None = None,
) -> Retrieved:
    """The run that `reference` names, in `root`: the folder that is there, or one made of what was uploaded.

    A folder that is made has the run's own id, its journal as it was uploaded last, and the checkpoint that is asked
    for, its hashes verified; a damaged one is named, and the one before taken where no particular one is asked for.
    Nothing is overwritten. `tracker` says where the server is, if it is MLflow; else the environment does. A server
    that cannot be reached is tried for `wait_s` seconds (60).

    Raises FetchError, CheckpointDamaged for a particular checkpoint, RootError.
    """
    wanted = parse_reference(reference)
    destination = (tracker if isinstance(tracker, MLflow) else MLflow()).destination()
    with RemoteFiles(destination, wait_s) as remote:
        seen = remote.look(wanted.run_id)
        if Path(seen.ours).name != seen.ours or RunFolder(Path(seen.ours)).name == seen.ours:
            raise FetchError(
                f"{reference}: its tag interlock.run_id is {seen.ours!r}; expected an id such as "
                "digits-20260131-120000-a1b2"
            )
        here = RunFolder(root.resolve() / seen.ours)
        if here.journal.is_file():
            say(f"{here.id} is in {root} already, and is gone on with as it is here")
            return Retrieved(here, _in_place(wanted, seen, here, remote), new=False)
        if JOURNAL not in seen.files:
            raise FetchError(
                f"{reference}: the run {seen.ours} has no {JOURNAL} at the server; expected the copy of its "
                "journal that is uploaded with each checkpoint. Copy the run's folder from where it was made instead"
            )
        if here.path.exists():
            raise FetchError(
                f"{reference}: its folder {here.path} is there, but has no {here.journal.name}; expected a whole run's "
                "folder, or none: move it away, and the run is fetched with its journal"
            )
        draft = _draft(root)
        try:
            names = _fill(draft, wanted, seen, remote, say)
            artifacts = {f"{CHECKPOINTS}/{name}": size for name, size in seen.checkpoints.items()}
            keep_fetched(draft.path, Fetched(destination.place, seen.run_id, artifacts))
            draft.path.rename(here.path)
        except BaseException:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise
    say(f"{here.id} was fetched from {remote.place}, with checkpoint {names[0]}")
    if seen.status == "RUNNING":
        say(f"MLflow shows {here.id} as RUNNING, on {seen.tags.get('interlock.host', 'a machine')}: {_ALONE}")
    newest = wanted.which == "last"
    return Retrieved(here, None if newest else here.checkpoints / names[0], new=True)


_ALONE = "if it still trains there, stop it, or the two will be delivered into one run"


def _draft(root: Path) -> RunFolder:
    draft = RunFolder(root / f".fetching-{getpid()}-{threading.get_ident()}-{time.time_ns()}")
    try:
        draft.checkpoints.mkdir(parents=True)
    except OSError as error:
        raise RootError(f"root {root}: cannot make a run's folder in it ({error})") from error
    return draft


def _fill(
    draft: RunFolder, wanted: Reference, seen: Seen, remote: RemoteFiles, say: Callable[[str], None]
) -> list[str]:
    """Journal and checkpoint; the names of those that are there now, the one that is meant first."""
    copy = remote.download(seen.run_id, JOURNAL, draft.path)
    try:
        journal_from_copy(copy, draft.journal)
    except JournalError as error:
        raise FetchError(f"{wanted}: {error}") from error
    copy.unlink()
    rows = _rows(draft, seen)
    chosen = _first_whole(
        choose(wanted, rows, seen.checkpoints), wanted, seen, remote, draft.checkpoints, say
    )
    names = [chosen.name]
    candidates = [row for row in reversed(rows) if row.name in seen.checkpoints]
    if chosen.state is State.DONE:  # a longer training goes on from the one before the end
        earlier = [row for row in candidates if row.state is not State.DONE and row.seq < chosen.seq]
        if earlier:
            names.append(_first_whole(earlier, wanted, seen, remote, draft.checkpoints, say).name)
    best = [row for row in candidates if row.best and row.seq <= chosen.seq and row.name not in names][:1]
    if best:  # without it, the next one would be taken for the best there has been
        with contextlib.suppress(FetchError, CheckpointDamaged):
            names.append(_first_whole(best, wanted, seen, remote, draft.checkpoints, say).name)
    forget_checkpoints(draft.journal, names)
    return names


def _rows(run: RunFolder, seen: Seen) -> list[Checkpoint]:
    with Journal.open(run) as journal:
        if journal.run_info().id != seen.ours:
            raise FetchError(
                f"the journal of MLflow run {seen.run_id} is that of {journal.run_info().id}; expected {seen.ours}"
            )
        # They become names of folders here.
        rows = journal.checkpoints(include_removed=True)
        return [row for row in rows if parse_checkpoint_name(row.name) is not None]


def _first_whole(
    candidates: Sequence[Checkpoint],
    wanted: Reference,
    seen: Seen,
    remote: RemoteFiles,
    folder: Path,
    say: Callable[[str], None],
) -> Checkpoint:
    """Download the first that is whole into `folder`."""
    draft = folder / ".tmp-fetched"
    for row in candidates:
        try:
            path = remote.download(seen.run_id, f"{CHECKPOINTS}/{row.name}", draft)
            verify_checkpoint(path)
            path.rename(folder / row.name)
            return row
        except (CheckpointDamaged, CheckpointFormatError) as error:
            if wanted.which != "last":
                raise
            why = (
                error.what if isinstance(error, CheckpointDamaged) else error
            )  # its path is that of the draft
            say(f"passing over checkpoint {row.name}, damaged at the server or on the way: {why}")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    names = ", ".join(row.name for row in candidates)
    raise FetchError(f"{wanted}: every checkpoint at the server is damaged ({names}); expected a whole one")


def _in_place(wanted: Reference, seen: Seen, here: RunFolder, remote: RemoteFiles) -> Path | None:
    """The checkpoint that is meant, in the folder that is here already; None for its newest."""
    with Journal.open(here) as journal:
        attempts = journal.attempts()
        rows = journal.checkpoints(include_removed=True)
    newest = attempts[-1].attempt if attempts else 0
    host = seen.tags.get("interlock.host", "")
    if seen.attempt > newest or (seen.attempt == newest and attempts and host not in ("", attempts[-1].host)):
        raise FetchError(
            f"{wanted}: {here.id} was gone on with elsewhere (attempt {seen.attempt}, on {host or 'another machine'}), "
            f"and the folder {here.path} has {newest} attempts of its own. To go on from what was uploaded, move that "
            "folder out of the way; to go on from the folder, resume it by its name"
        )
    if wanted.which == "last":
        return None
    local = {row.name: row.size_bytes for row in rows if (here.checkpoints / row.name).is_dir()}
    row = choose(wanted, rows, {**seen.checkpoints, **local})[0]
    if row.name not in local:
        _first_whole([row], wanted, seen, remote, here.checkpoints, warn)
    return here.checkpoints / row.name
