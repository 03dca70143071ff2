"""Saving in the background: the loop waits for a copy, or for part of one, a thread writes it to disk."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from orchestrator.snapshot.chunks import processors
from orchestrator.snapshot.deferred import Deferred, Later
from orchestrator.snapshot.encoding import decode, encode
from orchestrator.snapshot.filesystem import DISK, FileSystem
from orchestrator.snapshot.manifest import check_manifest
from orchestrator.snapshot.staging import Staged, Staging
from orchestrator.snapshot.storage import write_checkpoint
from states.errors import InterlockError
from tracking.forks import forget_in_children

__all__ = [
    "OPTIMIZER_STATE",
    "PARAMETERS",
    "ChangedMeanwhileError",
    "CheckpointWriter",
    "SaveHandle",
    "WriterClosedError",
]


PARAMETERS, OPTIMIZER_STATE = "parameters", "optimizer state"
"""Kinds of tensors: those of the model, and those of the optimizers, which only updates are to write to."""


class WriterClosedError(InterlockError):
    """The writer was closed, or belongs to the process that this one was forked from."""


class ChangedMeanwhileError(InterlockError):
    """What only updates write to was written to between the boundary of a save and the next update.

    Raised by the save's `wait`. It was not made; another is taken at the next boundary.
    """


class SaveHandle:
    """A checkpoint that is being written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ended = threading.Event()
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._told = False

    @property
    def done(self) -> bool:
        """Whether writing has ended, with success or with an error."""
        return self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """What went wrong; None where nothing has, so far."""
        return self._error

    def wait(self, timeout: float | None = None) -> Path:
        """The checkpoint's path, once it is durable and `on_durable` has returned.

        Raises what went wrong in writing or in `on_durable`, or TimeoutError after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(
                f"checkpoint {self.name} is still being written after {timeout} s; wait for longer"
            )
        if self._error is not None:
            self._told = True
            raise self._error
        assert self._path is not None
        return self._path

    def _succeed(self, path: Path) -> None:
        self._path = path
        self._ended.set()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._ended.set()

    def _forget(self) -> None:
        """In a forked child, which has no thread that would ever end this, and maybe a lock held for good."""
        if not self._ended.is_set():
            self._ended = threading.Event()
            self._fail(
                WriterClosedError(
                    f"checkpoint {self.name} is written by the process this one was forked from"
                )
            )


class CheckpointWriter:
    """Writes the checkpoints of one run into folder `parent`, one at a time, in the background.

    Invariant: at most one checkpoint is being written, from the one stretch of staging memory, which is as
    large as the largest state so far. `before_rename` and the `on_durable` of each save run in the writing
    thread. Closing waits; so does the end of the interpreter.
    """

    def __init__(
        self, parent: Path, *, before_rename: Callable[[], None] | None = None, files: FileSystem = DISK
    ) -> None:
        self._parent = parent
        self._before_rename = before_rename
        self._files = files
        self._staging = Staging()
        self._handle: SaveHandle | None = None
        self._thread: threading.Thread | None = None
        self._failed: list[SaveHandle] = []
        self._deferred: Deferred | None = None
        self._steady: dict[str, bool] = {}
        """Whether nothing but updates writes to tensors of a kind, by what was seen of them."""
        self._closed = False
        forget_in_children(self)

    def submit(
        self,
        name: str,
        tree: Any,
        manifest: Mapping[str, Any],
        on_durable: Callable[[Path], None] | None = None,
        *,
        left_alone: Collection[str] = (),
    ) -> SaveHandle:
        """Take a copy of `tree` and begin to write it; everything in `tree` may change as soon as this returns.

        Costs the caller one copy of the tensors; one from a CUDA device costs the device as much, which does nothing
        else meanwhile, and is not waited for. Where an earlier save is still being written, that is waited for first,
        so nothing is skipped; its failure does not stop this one. `on_durable(path)` is called once the checkpoint
        cannot be lost any more.

        `left_alone`: the kinds of tensors, PARAMETERS and OPTIMIZER_STATE, that are not written to before `finish_copy`
        is called. They may be copied until then, by the thread that writes or by the device, which saves the caller
        that part of the copy. The first such save copies them at once, and `finish_copy` sees whether that is so. Any
        code may write to parameters, so what is copied of them later is compared, by a digest, with what they were.
        They are copied at once where torch uses every processor, as the digest would only come on top, and on a device.

        Raises EncodingError for what cannot be stored and WriterClosedError. What goes wrong
        later is raised by the handle's `wait`, and kept in `failure` until then.
        """
        self._check_open()
        encoded = encode(tree)
        kept = decode(check_manifest(manifest), {})
        self._wait()
        kinds = [kind for kind in left_alone if self._steady.get(kind, True)]
        if PARAMETERS in kinds and not _has_spare_processor():
            kinds.remove(PARAMETERS)
        later = {kind: Later(compared=kind == PARAMETERS, made=kind not in self._steady) for kind in kinds}
        staged = self._staging.copy(encoded, later=lambda path: later.get(_kind(path)))
        self._deferred = staged.deferred
        handle = self._handle = SaveHandle(name)
        arguments = handle, staged, kept, on_durable
        thread = threading.Thread(target=self._write_yielding, args=arguments, name="interlock-checkpoint")
        try:
            thread.start()
            self._thread = thread  # not before: one that was never started cannot be waited for
        except (
            RuntimeError
        ):  # the interpreter exits, or there are too many threads: it is written all the same
            self._thread = None
            self._write(*arguments)
        return handle

    def finish_copy(self) -> ChangedMeanwhileError | None:
        """Wait until the copy of the newest save is complete; called before anything writes to what was left alone.

        What its handle's `wait` raises where that was written to earlier: the save was not made, and tensors of that
        kind are copied at once from now on.
        """
        deferred = self._deferred
        if deferred is None or self._handle is None:
            return None
        deferred.finish()
        self._deferred = None
        self._steady |= dict.fromkeys(map(_kind, deferred.paths), True)
        self._steady |= dict.fromkeys(map(_kind, (*deferred.changed, *deferred.unsteady)), False)
        return _changed(self._handle.name, deferred.changed) if deferred.changed else None

    def _check_open(self) -> None:
        if self._closed:
            raise WriterClosedError(
                "found a closed writer of checkpoints; expected an open one: make another"
            )
        if threading.current_thread() is self._thread:
            raise WriterClosedError(
                "a save cannot be begun by `on_durable` of another; ask for it from the loop"
            )

    def _write_yielding(self, *arguments: Any) -> None:
        """Write, and leave the processors to the training wherever it wants them."""
        # On Linux a thread has a niceness of its own, and hands it on to those that it starts. The lowest there is, but
        # not SCHED_IDLE, which never gets a turn beside training threads that spin while they wait for each other.
        if sys.platform == "linux":
            with suppress(OSError):  # a sandbox that refuses it must not cost the checkpoint
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._write(*arguments)

    def _write(
        self,
        handle: SaveHandle,
        staged: Staged,
        manifest: Mapping[str, Any],
        on_durable: Callable[[Path], None] | None,
    ) -> None:
        deferred = staged.deferred
        try:
            staged.wait()
            if deferred is not None and deferred.waits:
                deferred.work_through()
                if deferred.changed:
                    handle._fail(_changed(handle.name, deferred.changed))
                    return
            path = write_checkpoint(
                self._parent,
                handle.name,
                manifest=manifest,
                staged=staged,
                before_rename=self._before_rename,
                files=self._files,
            )
            if on_durable is not None:
                on_durable(path)
        except BaseException as error:
            self._failed.append(handle)
            handle._fail(error)
        else:
            handle._succeed(path)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    @property
    def failure(self) -> BaseException | None:
        """The first error that no `wait` has raised; None where there is none."""
        if not self._failed:
            return None
        return next((handle.error for handle in self._failed if not handle._told), None)

    def close(self) -> None:
        """Wait for what is being written, and give the staging memory back. May be called again.

        Raises the first error that no `wait` has raised.
        """
        self._closed = True
        self._wait()
        self._thread = self._deferred = None
        self._staging.release()
        untold = [handle for handle in self._failed if not handle._told]
        self._failed.clear()
        if untold:
            untold[0].wait()

    def forget(self) -> None:
        """In a forked child: the thread is not there, and the folder is the parent's."""
        self._closed = True
        self._thread = None
        self._failed = []
        if self._handle is not None:
            self._handle._forget()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:  # the one that ended the block matters more
            return


def _has_spare_processor() -> bool:
    """Whether the writing thread gets turns while torch computes."""
    return torch.get_num_threads() < processors()


@lru_cache(16_384)  # asked of the same ones at each save
def _kind(path: str) -> str:
    """PARAMETERS, OPTIMIZER_STATE, or "" where a path is of neither.

    Parameters that an optimizer has beside the model's are neither.
    """
    first, _, rest = path.partition("/")
    if first == "model" and rest.startswith("parameters/"):
        return PARAMETERS
    if first == "optimizers" and rest.partition("/")[2].startswith(("state/", "shared/")):
        return OPTIMIZER_STATE
    return ""


def _changed(name: str, paths: list[str]) -> ChangedMeanwhileError:
    more = f" and {len(paths) - 1} more" * (len(paths) > 1)
    return ChangedMeanwhileError(
        f"checkpoint {name} was not made: found that {paths[0]}{more} changed while it was copied, expected only the "
        "optimizer's step to change it; another is taken at the next boundary, unless the training halts there, and "
        "such are copied at once from now on"
    )
