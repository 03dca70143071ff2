"""The manifest of a checkpoint: what is in its folder, under a digest of its own; and the folder's name."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.snapshot.encoding import DecodingError, EncodingError, decode, encode
from orchestrator.snapshot.migrations import migrate
from states.errors import InterlockError
from states.table import State

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "CheckpointDamaged",
    "CheckpointFormatError",
    "CheckpointName",
    "FileRecord",
    "check_manifest",
    "checkpoint_name",
    "manifest_as_written",
    "parse_checkpoint_name",
    "read_manifest",
    "sealed",
    "versions",
]

FORMAT_VERSION = 3
"""The format that is written. Older ones are read too: `orchestrator.snapshot.migrations` knows the way."""
MANIFEST = "manifest.json"

_RESERVED = frozenset({"digest", "format_version", "versions", "files"})
_NO_DIGEST = b"0" * 64
_START = b'{"digest": "'


class CheckpointDamaged(InterlockError):
    """A checkpoint's files are not what was written. `path` is its folder, `what` names file and place."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        super().__init__(
            f"checkpoint {path} is damaged: {what}. Go on from another one, or restore it from a copy."
        )

    @property
    def passed_over(self) -> str:
        """What to say where one from before is taken instead."""
        return (
            f"passing over checkpoint {self.path.name} of {self.path.parent.parent.name}, which is damaged: "
            f"{self.what}. One from before is taken; to have this one, put back a copy of it"
        )


class CheckpointFormatError(InterlockError):
    """A checkpoint that is whole, but in a format that this interlock does not know."""


@dataclass(frozen=True)
class CheckpointName:
    """What a checkpoint's name says. `epoch` and `batch` are -1 where there is none yet."""

    seq: int
    attempt: int
    epoch: int
    batch: int
    state: State


_NAME = re.compile(r"(\d{9,})-a(\d+)(?:-e(\d+))?(?:-b(\d+))?-([A-Z_]+)", re.ASCII)


def checkpoint_name(seq: int, attempt: int, epoch: int, batch: int, state: State) -> str:
    """The name of the folder: `000001234-a1-e2-b113-BATCH_END`; epoch or batch left out where it is -1."""
    parts = [f"{seq:09d}", f"a{attempt}"]
    if epoch >= 0:
        parts.append(f"e{epoch}")
    if batch >= 0:
        parts.append(f"b{batch}")
    return "-".join([*parts, state.value])


def parse_checkpoint_name(name: str) -> CheckpointName | None:
    """What `name` says; None if `checkpoint_name` did not make it."""
    found = _NAME.fullmatch(name)
    if found is None or found[5] not in State.__members__:
        return None
    seq, attempt, epoch, batch = (-1 if part is None else int(part) for part in found.groups()[:4])
    parsed = CheckpointName(seq, attempt, epoch, batch, State[found[5]])
    return parsed if checkpoint_name(seq, attempt, epoch, batch, parsed.state) == name else None


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file: bytes, bytes of a chunk, hexadecimal digests of each chunk."""

    size: int
    chunk_size: int
    sha256: list[str]
    xxh3_128: list[str] | None = None
    """None in formats 1 and 2."""


def check_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` as JSON holds it.

    Raises EncodingError for tensors, for what cannot be encoded, and for the keys that are the format's own.
    """
    document = {}
    for key, value in manifest.items():
        if type(key) is not str or key in _RESERVED or key.startswith("$"):
            raise EncodingError(f"manifest/{key}", "a key that is not free", "Give it another name.")
        encoded = encode({key: value})
        if encoded.tensors:
            found = f"manifest/{next(iter(encoded.tensors))}"
            raise EncodingError(found, "a tensor or array in a manifest", "Put it into the state.")
        document[key] = encoded.document[key]
    return document


def sealed(document: Mapping[str, Any], files: Mapping[str, FileRecord]) -> bytes:
    """The file's content, from what `check_manifest` gave: its first entry is the SHA-256 of all of it.

    The digest is taken with zeros in the digest's place, in this and every later format.
    """
    content = {
        "digest": _NO_DIGEST.decode(),
        "format_version": FORMAT_VERSION,
        **document,
        "versions": versions(),
        "files": {name: vars(record) for name, record in files.items()},
    }
    text = json.dumps(content, allow_nan=False, indent=1).replace('{\n "', '{"', 1).encode() + b"\n"
    return text.replace(_NO_DIGEST, _digest(text), 1)


def versions() -> dict[str, str]:
    """The versions that the last bits of a result may depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in folder `path`, `files` included; cheap: no other file is looked at.

    That of an older format is given as in the newest; its `format_version` says which it was. Raises what
    `manifest_as_written` raises.
    """
    manifest, _ = migrate(manifest_as_written(path), None)
    return manifest


def manifest_as_written(path: Path) -> dict[str, Any]:
    """The manifest in the format that it has.

    Raises CheckpointDamaged where it is missing or not what was written, CheckpointFormatError where it
    was written by a newer interlock.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointDamaged(path, f"there is no {MANIFEST}, which every whole checkpoint has") from None
    except IsADirectoryError:
        raise CheckpointDamaged(path, f"{MANIFEST} is a folder") from None
    place = slice(len(_START), len(_START) + len(_NO_DIGEST))
    found, expected = _digest(text[: place.start] + _NO_DIGEST + text[place.stop :]), text[place]
    if not text.startswith(_START) or found != expected:
        raise CheckpointDamaged(
            path,
            f"{MANIFEST} ({len(text)} bytes): found SHA-256 {_short(found)}, expected {_short(expected)}",
        )
    document = json.loads(text)
    version = document.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointFormatError(
            f"checkpoint {path}: found format version {version!r}, expected 1 to {FORMAT_VERSION}, the newest that "
            "this interlock reads. Upgrade interlock to read it."
        )
    try:
        manifest: dict[str, Any] = decode(document, {})
    except DecodingError as error:
        raise CheckpointFormatError(f"checkpoint {path}: {MANIFEST}: {error}") from error
    return manifest


def _short(digest: bytes) -> str:
    return digest[:16].decode("ascii", "backslashreplace") + "…"
