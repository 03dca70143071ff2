"""Checkpoints on disk: folders that are written whole or not at all, verified while read, listed, removed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.snapshot.chunks import CHUNK, DIGESTS, InParallel
from orchestrator.snapshot.contents import DOCUMENT, MODEL, STATE, by_path
from orchestrator.snapshot.encoding import DecodingError, decode
from orchestrator.snapshot.filesystem import DISK, FileSystem, discard, write_file
from orchestrator.snapshot.manifest import (
    MANIFEST,
    CheckpointDamaged,
    CheckpointFormatError,
    CheckpointName,
    FileRecord,
    check_manifest,
    checkpoint_name,
    manifest_as_written,
    parse_checkpoint_name,
    read_manifest,
    sealed,
)
from orchestrator.snapshot.migrations import migrate
from orchestrator.snapshot.staging import Staged
from orchestrator.snapshot.tensor_file import HeaderError
from orchestrator.snapshot.verified_file import VerifiedFile
from states.errors import InterlockError

__all__ = [
    "LEFTOVER",
    "CheckpointDamaged",
    "CheckpointExists",
    "CheckpointFormatError",
    "CheckpointName",
    "CheckpointNameError",
    "CheckpointWriteError",
    "checkpoint_name",
    "clean_leftovers",
    "list_checkpoints",
    "parse_checkpoint_name",
    "read_checkpoint",
    "read_manifest",
    "remove_checkpoint",
    "verify_checkpoint",
    "write_checkpoint",
]

LEFTOVER = ".tmp-"
"""How the names begin of what interrupted saves and removals leave."""


class CheckpointWriteError(InterlockError, OSError):
    """The disk refused a checkpoint. Those that were there before are untouched."""


class CheckpointExists(InterlockError, FileExistsError):
    """There is a checkpoint of that name, and checkpoints are never replaced."""


class CheckpointNameError(InterlockError, ValueError):
    """A name that `checkpoint_name` did not make."""


def write_checkpoint(
    parent: Path,
    name: str,
    *,
    manifest: Mapping[str, Any],
    staged: Staged,
    before_rename: Callable[[], None] | None = None,
    files: FileSystem = DISK,
) -> Path:
    """Write a checkpoint into folder `parent` and return its path; it is durable then.

    The order is: a temporary folder, its files, fsync of each and of the folder; `before_rename()`, in which
    what the checkpoint relies on is made durable; the rename that makes it a checkpoint; fsync of `parent`.
    Chunks are hashed by other threads meanwhile. Nothing of `staged` is copied, so it must not change meanwhile.

    Raises CheckpointNameError, CheckpointExists and EncodingError (of the manifest) before anything is written;
    CheckpointWriteError where the disk fails; and what `before_rename` raises. After all of these there is
    no new checkpoint, except where the last fsync failed: then it is there and whole, but may not survive a
    power cut.
    """
    if parse_checkpoint_name(name) is None:
        raise CheckpointNameError(
            f"found the name {name!r} for a checkpoint; expected one like 000001234-a1-e2-b113-BATCH_END: make it "
            "with checkpoint_name"
        )
    document = check_manifest(manifest)
    path = parent / name
    if os.path.lexists(path):
        raise CheckpointExists(
            f"checkpoint {path} exists, and a checkpoint is never replaced: save after the next transition"
        )
    draft = parent / f"{LEFTOVER}{name}"
    try:
        with _explained(path, "nothing of it was kept"):
            _make_draft(draft, files)
            _write_files(draft, document, _contents(staged), files)
        if before_rename is not None:
            before_rename()
        with _explained(path, "nothing of it was kept"):
            files.rename(draft, path)
    except BaseException:
        with suppress(OSError):  # what is left of it is never taken for a checkpoint
            discard(files, draft)
        raise
    with _explained(path, "it is there and whole, but may be gone after a power cut"):
        files.sync_folder(parent)
    return path


@contextmanager
def _explained(path: Path, outcome: str) -> Iterator[None]:
    """Turn the disk's refusal into an error that says what it was about."""
    try:
        yield
    except OSError as error:
        advice = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "See to the disk"
        raise CheckpointWriteError(
            error.errno,
            f"checkpoint {path} could not be written ({error.strerror or error}): {outcome}; earlier checkpoints are "
            f"untouched. {advice}, and save again",
        ) from error


def _make_draft(draft: Path, files: FileSystem) -> None:
    if not draft.parent.is_dir():
        files.make_folder(draft.parent)
        files.sync_folder(draft.parent.parent)
    if draft.exists():
        discard(files, draft)
    files.make_folder(draft)


def _contents(staged: Staged) -> dict[str, list[memoryview]]:
    """What each file will hold, in chunks."""
    document = {"weights": list(staged.weights), "tree": staged.document}
    text = json.dumps(document, allow_nan=False).encode()
    files = {**staged.files, DOCUMENT: memoryview(text)}
    return {
        name: [content[begin : begin + CHUNK] for begin in range(0, content.nbytes, CHUNK)]
        for name, content in files.items()
    }


def _write_files(
    draft: Path, manifest: Mapping[str, Any], contents: Mapping[str, list[memoryview]], files: FileSystem
) -> None:
    every = [[chunk] for chunks in contents.values() for chunk in chunks]
    with InParallel(_digests, every) as hashing:
        for name, chunks in contents.items():
            write_file(files, draft / name, chunks)
        digests = iter(hashing.results())
    records = {}
    for name, chunks in contents.items():
        found = [next(digests) for _ in chunks]
        size = sum(chunk.nbytes for chunk in chunks)
        records[name] = FileRecord(size, CHUNK, **{kind: [each[kind] for each in found] for kind in DIGESTS})
    write_file(files, draft / MANIFEST, [memoryview(sealed(manifest, records))])
    files.sync_folder(draft)


def _digests(chunk: Sequence[memoryview]) -> dict[str, str]:
    return {kind: digest(chunk) for kind, digest in DIGESTS.items()}


# -- reading -----------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Any]:
    """The manifest and the tree of the checkpoint in folder `path`, every byte verified.

    Tensors are on the CPU, each with memory of its own. Those of an older format are given as in
    the newest; `format_version` says which it was.
    Raises CheckpointDamaged, naming file, byte range and digests, or CheckpointFormatError.
    """
    manifest = manifest_as_written(path)
    document, model, state = (VerifiedFile(path, name, manifest) for name in (DOCUMENT, MODEL, STATE))
    try:
        found = json.loads(document.content())
        tensors = by_path(model.tensors(), state.tensors(), found["weights"])
        return migrate(manifest, decode(found["tree"], tensors))
    except (DecodingError, HeaderError, KeyError, ValueError) as error:
        # The digests hold, so this is what was written.
        raise CheckpointFormatError(f"checkpoint {path} cannot be read by this interlock: {error}") from error


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read every file of the checkpoint in folder `path`, and return its manifest.

    Raises CheckpointDamaged, naming file, byte range and digests, or CheckpointFormatError.
    """
    manifest = read_manifest(path)
    for name in manifest["files"]:
        VerifiedFile(path, name, manifest).verify()
    return manifest


# -- all of a run's checkpoints ----------------------------------------------------------------------


def list_checkpoints(parent: Path) -> list[Path]:
    """The checkpoints in folder `parent`, newest first: by number of transition, then attempt.

    Nothing of them is read, so damaged ones are among them; other files and folders, and what interrupted
    saves left, are not. None, if there is no such folder.
    """
    found = []
    with suppress(FileNotFoundError), os.scandir(parent) as entries:
        for entry in entries:
            name = parse_checkpoint_name(entry.name)
            if name is not None and entry.is_dir():
                found.append((name.seq, name.attempt, entry.name))
    return [parent / name for *_, name in sorted(found, reverse=True)]


def remove_checkpoint(path: Path, *, files: FileSystem = DISK) -> None:
    """Remove the checkpoint in folder `path`; one that is half removed is never taken for a whole one.

    Raises CheckpointWriteError where the disk fails; then it is whole, or gone from the list.
    """
    doomed = path.parent / f"{LEFTOVER}removed-{path.name}"
    try:
        if doomed.exists():
            discard(files, doomed)
        files.rename(path, doomed)
        files.sync_folder(path.parent)
        discard(files, doomed)
    except OSError as error:
        raise CheckpointWriteError(
            error.errno,
            f"checkpoint {path} could not be removed ({error.strerror or error}). See to the disk; what is left under "
            f"the name {doomed.name} can be deleted",
        ) from error


def clean_leftovers(parent: Path, *, files: FileSystem = DISK) -> list[str]:
    """Remove what interrupted saves and removals left in folder `parent`; returns the names.

    Only for whoever holds the run's lease: a save in progress looks the same. Raises CheckpointWriteError.
    """
    try:
        names = sorted(name for name in os.listdir(parent) if name.startswith(LEFTOVER))
        for name in names:
            discard(files, parent / name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointWriteError(
            error.errno,
            f"what interrupted saves left in {parent} could not be removed ({error.strerror or error}). See to the "
            f"disk; everything there whose name begins with {LEFTOVER} can be deleted",
        ) from error
    return names
