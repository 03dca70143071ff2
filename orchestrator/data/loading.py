"""Making batches: in this process, or in data workers by a loader rebuilt around the user's data set."""

import atexit
import contextlib
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import util as multiprocessing_util
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from orchestrator.data.batches import pinned
from orchestrator.data.generators import (
    Found,
    Generator,
    find_generators,
    get_state,
    seed_generator,
    set_state,
)
from orchestrator.data.order import Order, Task
from orchestrator.data.randomness import put_globals, seed_globals, take_globals
from orchestrator.warning import warn

__all__ = [
    "BatchMaker",
    "Loading",
    "WorkerStart",
    "can_pin",
    "close_at_exit",
    "end_workers",
    "outlived_sigterm",
    "rebuilt",
    "whole",
]

_GRACE_SECONDS = 120


class BatchMaker(Dataset[Any]):
    """A data set whose key is a task and whose item is the whole batch, the same one in every process.

    Each batch is drawn from a stream seeded by its task: torch's CPU generator, Python's, NumPy's legacy one,
    and the generators that the data set and the collate function own. `make` puts all of them back
    afterwards; `maker[task]`, for data workers, need not.
    """

    def __init__(self, loader: DataLoader[Any], role: str) -> None:
        self.dataset = loader.dataset
        self.collate_fn = loader.collate_fn
        self._batched = loader.batch_sampler is not None
        self._role = role
        self.still = _draws_nothing(loader.dataset) and loader.collate_fn in (
            default_collate,
            default_convert,
        )
        self._bits: np.random.MT19937 | None = None
        self._owned: dict[str, Generator] = {}
        self._epoch = -1
        self._walks = 0

    def find_generators(self) -> Found:
        """The generators that the data set and the collate function own."""
        if self.still:
            return Found()
        return find_generators({"dataset": self.dataset, "collate_fn": self.collate_fn})

    def make(self, task: Task) -> Any:
        """The batch of `task`; all random states are afterwards what they were."""
        if self.still:
            return self._load(task.indices)
        main = take_globals()
        kept: list[tuple[Generator, Any]] = []
        try:
            self._find_owned(task.epoch)
            kept = [(generator, get_state(generator)) for generator in self._owned.values()]
            return self._load_seeded(task)
        finally:
            for generator, state in kept:
                set_state(generator, state)
            put_globals(main)

    def __getitem__(self, task: Task) -> Any:
        """The batch of `task`; leaves the generators where its stream ended."""
        outlived_sigterm()
        if self.still:
            return self._load(task.indices)
        self._find_owned(task.epoch)
        return self._load_seeded(task)

    def _load_seeded(self, task: Task) -> Any:
        if self._bits is None:
            self._bits = np.random.MT19937(0)
        seed_globals(task.seed, self._bits)
        for path, generator in self._owned.items():
            seed_generator(generator, path, task.seed)
        return self._load(task.indices)

    def _load(self, indices: Any) -> Any:
        dataset: Any = self.dataset
        if not self._batched:
            return self.collate_fn(dataset[indices])
        many = getattr(dataset, "__getitems__", None)
        return self.collate_fn(many(indices) if many else [dataset[index] for index in indices])

    def _find_owned(self, epoch: int) -> None:
        """Look for owned generators before the first two batches that this process makes in an epoch.

        At the second look those are seen that `__getitem__` makes for itself the first time.
        """
        if epoch != self._epoch:
            self._epoch, self._walks = epoch, 0
        if self._walks == 2:
            return
        owned = self.find_generators().seedable
        if self._walks == 1:
            for path in owned.keys() - self._owned.keys():
                warn(
                    f"{self._role} data: the generator {path} was made while a batch was made, so what "
                    "it drew for that "
                    "batch is not reproducible; make it in the data set's __init__"
                )
        self._owned = owned
        self._walks += 1


class WorkerStart:
    """What a data worker does first: see to signals, show the user's data set, call the user's init function.

    Schedulers signal every process of a job, and a terminal its whole group: SIGINT is ignored, and a SIGTERM
    does not end a worker that is still given work. One that is not, 120 seconds later, ends.
    """

    def __init__(self, init_fn: Callable[[int], None] | None, shift: int = 0) -> None:
        self._init_fn = init_fn
        self._shift = shift

    def __call__(self, worker_id: int) -> None:
        """Prepare this process, which torch started as data worker `worker_id`."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _on_sigterm)
        info = get_worker_info()
        if info is not None:
            # Users look here for their own data set, to give each worker its part of it. (The class is
            # frozen.)
            own: Any = info.dataset
            number = (worker_id + self._shift) % info.num_workers
            for name, value in (
                ("dataset", own.dataset),
                ("id", number),
                ("seed", info.seed - worker_id + number),
            ):
                object.__setattr__(info, name, value)
            worker_id = number
        if self._init_fn is not None:
            self._init_fn(worker_id)


_sigterm_pending = False


def _on_sigterm(*_: object) -> None:
    # Long enough for the main process to save, which a dying worker would disturb; short enough that whoever
    # terminates a worker and waits for it does not wait for ever.
    global _sigterm_pending
    _sigterm_pending = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_GRACE_SECONDS)


def outlived_sigterm() -> None:
    """Called in a data worker that is given work: it need not end after all."""
    global _sigterm_pending
    if _sigterm_pending:
        _sigterm_pending = False
        signal.alarm(0)


def whole(batch: Any) -> Any:
    """The collate function of a loader whose data set gives whole batches."""
    return batch


class _Feed:
    """The sampler of the rebuilt loader: the tasks of an order, each handed out once."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        return self._order.take()


class Loading:
    """The batches of an order's tasks, one by one, made ahead by the loader's workers if it has any."""

    def __init__(self, loader: DataLoader[Any], order: Order, maker: BatchMaker) -> None:
        self._loader = loader
        self._order = order
        self._maker = maker
        self._rebuilt: DataLoader[Any] | None = None
        self._batches: Any = None
        self._pins = loader.num_workers == 0 and loader.pin_memory and can_pin()
        self._generator = torch.Generator()
        self._pid = os.getpid()
        self.waiting = False
        if loader.num_workers > 0:
            close_at_exit(self)

    def next(self) -> Any:
        """The batch of the next task."""
        if self._loader.num_workers == 0:
            batch = self._maker.make(self._order.take())
            return pinned(batch) if self._pins else batch
        if self._batches is None:
            self._batches = iter(self._rebuilt_loader())
        self.waiting = True
        try:
            return next(self._batches)
        finally:
            self.waiting = False

    def end_epoch(self) -> None:
        """Let the workers go, or, if they are persistent, wait for another epoch."""
        if self._loader.persistent_workers:
            self._batches = None  # taken up again, and drained of what is left, by the loader's own __iter__
        else:
            self.close()

    def close(self) -> None:
        """End the workers, if need be by SIGKILL; the next batch starts new ones."""
        if os.getpid() != self._pid:  # a forked child has no say over them
            return
        # A persistent loader keeps its iterator between epochs. (An iterator's truth is its length: not asked
        # for.)
        iterator = getattr(self._rebuilt, "_iterator", None) if self._batches is None else self._batches
        self._batches = self._rebuilt = None
        end_workers(iterator)

    def _rebuilt_loader(self) -> DataLoader[Any]:
        # Workers show this seed to users (get_worker_info().seed); the global generator is not drawn from.
        self._generator.manual_seed(self._order.base_seed)
        if self._rebuilt is None:
            self._rebuilt = rebuilt(self._loader, self._maker, _Feed(self._order), generator=self._generator)
        return self._rebuilt


def end_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, if need be by SIGKILL; None has none."""
    if iterator is None:
        return
    workers = list(getattr(iterator, "_workers", ()))
    shut_down = getattr(iterator, "_shutdown_workers", None)
    try:
        if shut_down is not None:
            shut_down()
    finally:
        for worker in workers:
            if worker.is_alive():  # hung: the shut-down has asked twice, and waited ten seconds
                worker.kill()
                worker.join()


def rebuilt(
    loader: DataLoader[Any],
    dataset: Any,
    sampler: Any,
    *,
    generator: torch.Generator,
    num_workers: int | None = None,
    one_pass: bool = False,
    shift: int = 0,
) -> DataLoader[Any]:
    """A loader with the settings of `loader`, over a data set that has the user's as `dataset`, and whose
    items are whole batches.

    For `one_pass`, or with a `num_workers` of its own, its workers do not persist. The first worker has the
    number `shift`, and the others follow on it in a circle.
    """
    optional: dict[str, Any] = (
        {"pin_memory_device": loader.pin_memory_device} if loader.pin_memory_device else {}
    )
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=loader.num_workers if num_workers is None else num_workers,
        collate_fn=whole,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=WorkerStart(loader.worker_init_fn, shift),
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers and num_workers is None and not one_pass,
        **optional,
    )


def _draws_nothing(dataset: Any) -> bool:
    """Whether reading `dataset` is known to draw from no generator, so that streams could not be seen."""
    if type(dataset) is TensorDataset:
        return all(type(tensor) is torch.Tensor for tensor in dataset.tensors)
    if type(dataset) is Subset:
        return _draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_draws_nothing(part) for part in dataset.datasets)
    if type(dataset) in (list, tuple):
        return _is_plain(dataset[:1])
    return type(dataset) in (torch.Tensor, np.ndarray)


def _is_plain(item: Any) -> bool:
    if type(item) in (list, tuple):
        return all(_is_plain(part) for part in item)
    if type(item) is dict:
        return all(_is_plain(part) for part in item.values())
    return type(item) in (torch.Tensor, np.ndarray, int, float, str, bool) or isinstance(item, np.generic)


def can_pin() -> bool:
    """Whether there is an accelerator that pinned memory is of use for; a warning says so if not."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "mps":
        return True
    warn("pin_memory=True, but there is no accelerator that it is of use for; nothing is pinned")
    return False


class _Closes(Protocol):
    def close(self) -> None: ...


_open_loadings: "weakref.WeakSet[_Closes]" = weakref.WeakSet()
_exit_registered_by = 0


def close_at_exit(loading: _Closes) -> None:
    """See to it that no worker outlives this process: they do not take its SIGTERM for an order.

    Both ways of ending are covered: an interpreter's exit, before torch stops shutting workers down, and the
    end of a process started by multiprocessing, which does not run `atexit`.
    """
    global _exit_registered_by
    _open_loadings.add(loading)
    if _exit_registered_by != os.getpid():
        _exit_registered_by = os.getpid()
        atexit.register(_close_all)
        multiprocessing_util.Finalize(None, _close_all, exitpriority=100)


def _close_all() -> None:
    for loading in list(_open_loadings):
        with contextlib.suppress(Exception):
            loading.close()
