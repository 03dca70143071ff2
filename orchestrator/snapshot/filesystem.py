"""The one seam through which checkpoints change a disk, so that tests can fail each call in turn."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

__all__ = ["DISK", "Disk", "FileSystem", "discard", "write_file"]


class FileSystem(Protocol):
    """What writing and removing a checkpoint does to a disk. Everything raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a folder, which must not exist."""

    def create(self, path: Path) -> int:
        """Open a new file, which must not exist, for writing; returns its descriptor."""

    def write(self, file: int, data: memoryview) -> int:
        """Write the bytes at the file's end, or some of them; returns how many."""

    def sync(self, file: int) -> None:
        """Make the content of an open file durable."""

    def close(self, file: int) -> None:
        """Close a descriptor."""

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a folder another name."""

    def remove_file(self, path: Path) -> None:
        """Remove a file."""

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""


class Disk:
    """The file system of the machine.

    Whole blocks of aligned memory go to the device past the page cache, where the file system can do that: no processor
    is busy copying, no memory fills with a second copy, and the data set is not pushed out of the cache.
    """

    def make_folder(self, path: Path) -> None:
        """See FileSystem."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """See FileSystem."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # Not by `open`: a file system that cannot do it would refuse, and leave the file there.
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | _DIRECT)
        return file

    def write(self, file: int, data: memoryview) -> int:
        """See FileSystem."""
        try:
            return os.write(file, data)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
        # The file's end, which is no whole block, or memory that is not aligned.
        fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
        return os.write(file, data)

    def sync(self, file: int) -> None:
        """See FileSystem."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """See FileSystem."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """See FileSystem."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, old: Path, new: Path) -> None:
        """See FileSystem."""
        os.rename(old, new)

    def remove_file(self, path: Path) -> None:
        """See FileSystem."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """See FileSystem."""
        path.rmdir()


_DIRECT = getattr(os, "O_DIRECT", 0)

DISK = Disk()


def write_file(files: FileSystem, path: Path, chunks: Iterable[memoryview]) -> None:
    """Write a new file, chunk by chunk, and make its content durable."""
    file = files.create(path)
    try:
        for chunk in chunks:
            _write_all(files, file, chunk)
        files.sync(file)
    finally:
        files.close(file)


def _write_all(files: FileSystem, file: int, data: memoryview) -> None:
    while data:
        written = files.write(file, data)
        if written <= 0:
            raise OSError(errno.EIO, f"nothing was written of {data.nbytes} bytes")
        data = data[written:]


def discard(files: FileSystem, folder: Path) -> None:
    """Remove a folder with all that is in it."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            discard(files, Path(entry.path))
        else:
            files.remove_file(Path(entry.path))
    files.remove_folder(folder)
