"""VerifiedFile: a file of a checkpoint, of which no byte is believed before its digest has been compared."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.snapshot.chunks import DIGESTS, TOGETHER, InParallel, after, chunked
from orchestrator.snapshot.manifest import CheckpointDamaged, CheckpointFormatError, FileRecord
from orchestrator.snapshot.tensor_file import HeaderError, header_length, memory, read_header

__all__ = ["VerifiedFile"]

# What a disk says of a file that is gone or unreadable; other errors (no memory, no permission) tell nothing of it.
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO})


class VerifiedFile:
    """File `name` of the checkpoint in `folder`, as its manifest says it should be.

    What is read to be used is compared by XXH3, where the manifest has that; `verify` compares all digests.
    Raises CheckpointFormatError if the manifest knows no such file; all methods raise CheckpointDamaged.
    """

    def __init__(self, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._name = name
        if name not in manifest["files"]:
            raise CheckpointFormatError(
                f"checkpoint {folder}: found the files {sorted(manifest['files'])}, expected {name} among them. "
                "Upgrade interlock to read it."
            )
        self._record = FileRecord(**manifest["files"][name])
        recorded = {kind: getattr(self._record, kind) for kind in DIGESTS}
        self._digests: dict[str, list[str]] = {k: v for k, v in recorded.items() if v is not None}
        self._quickest = ["sha256" if self._record.xxh3_128 is None else "xxh3_128"]

    def content(self) -> bytearray:
        """All of it, verified."""
        with self._open() as file:
            content = bytearray(self._record.size)
            self._read(file, [memoryview(content)])
        return content

    def tensors(self) -> dict[str, Tensor]:
        """What a file of tensors holds, verified."""
        with self._open() as file:
            header = self._header(file)
            entries = read_header(header, self._record.size)
            made = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
            views = [memory(tensor) for tensor in made.values() if tensor.numel()]
            self._read(file, [memoryview(bytearray(len(header))), *views])
        return made

    def verify(self) -> None:
        """Read all of it, compare every digest, and keep nothing."""
        with self._open() as file:
            numbers = range(len(self._record.sha256))
            with InParallel(lambda number: self._check(file, number), numbers) as checking:
                checking.results()

    def _check(self, file: int, number: int) -> None:
        self._chunk(file, number, self._digests)

    def _chunk(self, file: int, number: int, kinds: Iterable[str]) -> bytearray:
        first = number * self._record.chunk_size
        content = bytearray(min(self._record.chunk_size, self._record.size - first))
        self._fill(file, number, [memoryview(content)], kinds)
        return content

    def _header(self, file: int) -> bytes:
        """Length and header, from chunks that are verified before they are believed."""
        if not self._record.sha256:
            raise HeaderError("an empty file")
        content = self._chunk(file, 0, self._quickest)
        length = header_length(content, self._record.size)
        number = 1
        while len(content) < length:
            content += self._chunk(file, number, self._quickest)
            number += 1
        return bytes(content[:length])

    @contextmanager
    def _open(self) -> Iterator[int]:
        try:
            file = os.open(self._folder / self._name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                if size != self._record.size:
                    raise self._damaged(f"found {size} bytes, expected {self._record.size}")
                yield file
            finally:
                os.close(file)
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            raise self._damaged(f"it cannot be read ({error.strerror})") from error

    def _read(self, file: int, views: Sequence[memoryview]) -> None:
        """Read the whole file into `views`, which have its size, and compare a digest of every chunk."""
        chunks = list(enumerate(chunked(views, self._record.chunk_size)))
        with InParallel(lambda chunk: self._fill(file, *chunk, self._quickest), chunks) as reading:
            reading.results()

    def _fill(self, file: int, number: int, chunk: Sequence[memoryview], kinds: Iterable[str]) -> None:
        first = position = number * self._record.chunk_size
        left = chunk
        while left:
            count = os.preadv(file, left[:TOGETHER], position)
            if count == 0:
                raise self._damaged(f"it ends at byte {position}, expected {self._record.size} bytes")
            left, position = after(left, count), position + count
        for kind in kinds:
            found, expected = DIGESTS[kind](chunk), self._digests[kind][number]
            if found != expected:
                raise self._damaged(
                    f"bytes {first} to {position - 1}: found {kind} {found[:16]}…, expected {expected[:16]}…"
                )

    def _damaged(self, what: str) -> CheckpointDamaged:
        return CheckpointDamaged(self._folder, f"{self._name}: {what}")
