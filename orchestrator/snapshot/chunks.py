"""Files in chunks: cut from memory, digested by several threads while other work goes on."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import xxhash

__all__ = ["CHUNK", "DIGESTS", "TOGETHER", "InParallel", "after", "chunked", "processors"]

CHUNK = 32 << 20
"""Bytes of a file under one digest; its last chunk may be shorter.

As many as keep the training's thread from waiting: whoever has written one, or has one of its two digests, takes the
interpreter's lock for a moment, and with an eighth of the size steps of half a millisecond took 1.3 times as long
meanwhile, not 1.1.
"""

TOGETHER = 512
"""How many buffers one system call is given; Linux allows 1,024."""

T = TypeVar("T")
R = TypeVar("R")


def chunked(buffers: Iterable[memoryview], size: int) -> list[list[memoryview]]:
    """The bytes of `buffers`, one after another, cut into pieces of `size` in all; nothing is copied."""
    chunks: list[list[memoryview]] = []
    room = 0
    for buffer in buffers:
        position = 0
        while position < buffer.nbytes:
            if room == 0:
                chunks.append([])
                room = size
            part = buffer[position : position + room]
            chunks[-1].append(part)
            position += part.nbytes
            room -= part.nbytes
    return chunks


def after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` when the first `count` bytes are done."""
    done = 0
    while done < len(buffers) and count >= buffers[done].nbytes:
        count -= buffers[done].nbytes
        done += 1
    left = list(buffers[done:])
    if count:
        left[0] = left[0][count:]
    return left


def _digest(kind: Callable[[], Any], chunk: Sequence[memoryview]) -> str:
    digest = kind()
    for part in chunk:
        # Lets other threads run, which xxhash's functions for all at once do not before its version 4.
        digest.update(part)
    text: str = digest.hexdigest()
    return text


DIGESTS: Mapping[str, Callable[[Sequence[memoryview]], str]] = {
    "sha256": partial(_digest, hashlib.sha256),
    "xxh3_128": partial(_digest, xxhash.xxh3_128),
}
"""What gives the hexadecimal digest of a chunk, by the digest's name. Other threads run meanwhile.

XXH3 is as fast as memory, a dozen times as fast as SHA-256. Damage that leaves its 128 bits as they were is as unlikely
as with any other digest; it does not resist somebody who looks for two contents with one.
"""


class InParallel(Generic[T, R]):
    """Work on each of some items, begun at once by helper threads; whoever asks for the results joins in.

    Leaving the `with` block abandons what has not begun. No thread outlives it. Not an executor of
    concurrent.futures: those refuse work once the interpreter exits, while a last checkpoint is written.
    """

    def __init__(self, work: Callable[[T], R], items: Sequence[T]) -> None:
        self._work = work
        self._items = items
        self._results: list[Any] = [None] * len(items)
        self._numbers = itertools.count()  # its next() is one step for all threads
        self._errors: list[BaseException] = []
        self._abandoned = False
        self._threads: list[threading.Thread] = []
        self._start(min(_helpers(), len(items)))

    def _start(self, helpers: int) -> None:
        for _ in range(helpers):
            thread = threading.Thread(target=self._run, name="interlock-chunks")
            try:
                thread.start()
            except RuntimeError:  # the interpreter exits, or there are too many: fewer hands do it too
                return
            self._threads.append(thread)

    def _run(self) -> None:
        while not (self._abandoned or self._errors):
            number = next(self._numbers)
            if number >= len(self._items):
                return
            try:
                self._results[number] = self._work(self._items[number])
            except BaseException as error:
                self._errors.append(error)

    def results(self) -> list[R]:
        """What the work gave for each item, in their order; the first error is raised again."""
        self._run()
        self._join()
        if self._errors:
            raise self._errors[0]
        return self._results

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> InParallel[T, R]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._abandoned = True
        self._join()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _helpers() -> int:
    """How many threads help: one for each further processor, but always one, and no more than eight."""
    return max(1, min(processors() - 1, 8))
