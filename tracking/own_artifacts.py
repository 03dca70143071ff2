"""Artifacts of the user's own: files that hooks write into the run's folder, and which the server has not got yet.

A file is written under a draft's name and renamed, so that whoever looks sees it whole or not at all. What a file
holds is never changed afterwards; another one may take its place, which is known by its time and size.
"""

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from states.errors import InterlockError
from tracking.runs import RunFolder

__all__ = ["ArtifactError", "check_path", "clean_drafts", "version", "waiting_own", "writing"]

_DRAFT = ".artifact-"

_TAKEN = {
    "checkpoints",
    "curves.png",
    "journal.sqlite.gz",
    "machine.svg",
    "metrics.csv.gz",
    "model",
    "timeline.html",
    "transitions.jsonl.gz",
}
"""What interlock's own artifacts are called at the server."""


class ArtifactError(InterlockError):
    """A file that cannot be an artifact of the run."""


def check_path(path: str) -> PurePosixPath:
    """The path of an artifact within the run's; raises ArtifactError, which says why, if it cannot be one."""
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or any(part in ("", "..") or part.startswith(".") for part in parts) or "\\" in path:
        raise ArtifactError(
            f"artifact: found the path {path!r}; expected a relative one with slashes, such as 'samples/epoch-3.png', "
            "no part of which is empty or begins with a dot"
        )
    if parts[0] in _TAKEN:
        raise ArtifactError(
            f"artifact: found the path {path!r}, where interlock puts what it makes itself; expected another, such as "
            f"'own/{path}'"
        )
    return PurePosixPath(path)


@contextlib.contextmanager
def writing(run: RunFolder | None, path: str) -> Iterator[Path]:
    """Give a path to write a file to, which then becomes the artifact `path` of `run`; with None it is thrown away.

    It takes the place of one that was there, unless that holds the very same. Nothing becomes of it when the block
    raises. Raises ArtifactError.
    """
    relative = check_path(path)
    with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=None if run is None else run.path) as folder:
        draft = Path(folder, relative.name)
        yield draft
        if not draft.is_file():
            found = "a folder was made" if draft.is_dir() else "nothing was written"
            raise ArtifactError(
                f"artifact {path!r}: {found} at the path that was given; expected one file to be written there"
            )
        if run is not None:
            _put(draft, run.artifacts / relative)


def _put(draft: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if filecmp.cmp(draft, target, shallow=False):
                return  # made again after a resume
            before = target.stat().st_mtime_ns
            if draft.stat().st_mtime_ns <= before:  # clocks of file systems tick every few milliseconds
                os.utime(draft, ns=(before + 1, before + 1))
        _sync(draft)
        draft.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise ArtifactError(f"artifact: cannot be kept as {target} ({error})") from error


def clean_drafts(run: RunFolder) -> None:
    """Remove what a process that was killed in the middle of writing has left."""
    for folder in run.path.glob(f"{_DRAFT}*"):
        shutil.rmtree(folder, ignore_errors=True)


def version(file: Path) -> str:
    """What tells a file from one that was in its place before. Raises FileNotFoundError."""
    found = file.stat()
    return f"{found.st_mtime_ns}-{found.st_size}"


def waiting_own(run: RunFolder, sent: Mapping[str, str]) -> list[str]:
    """The paths of those of which the server has not got this version, the oldest first; `sent` are those it has."""
    found: list[tuple[int, str]] = []
    for folder, _, names in os.walk(run.artifacts):
        for name in names:
            file = Path(folder, name)
            path = file.relative_to(run.artifacts).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if sent.get(path) != version(file):
                    found.append((file.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
