"""The order of an epoch: a sampler's index lists, fixed by the random states at the epoch's start."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from orchestrator.data.counters import Counters, chain
from orchestrator.data.errors import DataError
from orchestrator.data.generators import Generator, find_generators, get_state, set_state
from orchestrator.data.randomness import (
    SideStream,
    mixed,
    put_globals,
    record_globals,
    restore_globals,
    take_globals,
)

__all__ = ["Order", "Task", "draw_base_seed", "index_sampler", "length_of"]

_DRAW_BEFORE_FIRST = (
    *(SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler),
    *(list, tuple, range),
)
_SAMPLER_STREAM = -1  # beside the batches' streams, which are numbered from 0
_END = object()


class Task(NamedTuple):
    """What it takes to make one batch, in any process: its indices, and the seed of its stream."""

    epoch: int
    seed: int
    indices: Any


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What gives a batch's indices: the batch sampler, or the sampler where there is no automatic
    batching."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def draw_base_seed(loader: DataLoader[Any]) -> int:
    """One seed for an epoch, drawn as the plain loader's iterator draws its own."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())


class Order:
    """The tasks of one epoch after another, with one index list of look-ahead.

    The random states at the start of an epoch (`origin`) fix it: `replay` from them gives the same tasks and
    leaves the sampler's generators in the same states. A sampler that may draw from the global generators
    while it is iterated does so, after its first index list, on a stream of its own.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._sampler = index_sampler(loader)
        self._isolated = not _draws_before_first(self._sampler)
        self._generators = self._find_generators()
        self._counters = Counters(
            {
                path: sampler
                for path, sampler in chain(self._sampler, "sampler").items()
                if not type(sampler).__module__.startswith("torch.")
            }
        )
        # A loader with workers takes its sampler's iterator twice. It shows with samplers that draw, or
        # count, when their iterator is taken, and then belongs to the order, whatever the number of workers
        # later on.
        self.passes = 2 if loader.num_workers > 0 else 1
        self.base_seed = 0
        self._epoch = -1
        self.taken = 0
        self._indices: Iterator[Any] = iter(())
        self._ahead: Any = _END
        self._side: SideStream | None = None

    @property
    def has_next(self) -> bool:
        """Whether there is a task that was not taken yet."""
        return self._ahead is not _END

    @property
    def length(self) -> int | None:
        """The number of batches that the sampler says an epoch has; None if it does not say."""
        if not self._isolated:
            return length_of(self._sampler)
        # A bucketing sampler may go through its own drawing to count its batches.
        origin, main = self.record(), take_globals()
        try:
            restore_globals(origin)
            return length_of(self._sampler)
        finally:
            self.restore(origin)
            put_globals(main)

    def take(self) -> Task:
        """The next task; StopIteration at the end of the epoch."""
        if self._ahead is _END:
            raise StopIteration
        indices = self._ahead
        with self._side or nullcontext():
            self._ahead = next(self._indices, _END)
        task = Task(self._epoch, mixed(self.base_seed, self.taken), indices)
        self.taken += 1
        return task

    def record(self) -> dict[str, Any]:
        """The random states that an epoch beginning now is fixed by, and what the sampler counts."""
        recorded = record_globals()
        if not self._isolated:
            recorded = {"torch": recorded["torch"]}
        recorded["generators"] = {path: get_state(owned) for path, owned in self._generators.items()}
        recorded["counters"] = self._counters.changed()
        return recorded

    def restore(self, origin: dict[str, Any]) -> None:
        """Put the sampler and its generators, not the global ones, back to `origin`.

        Raises DataError if `origin` was recorded with generators that this loader does not have.
        """
        saved = origin["generators"]
        if saved.keys() != self._generators.keys():
            raise DataError(
                f"the saved order of the data was drawn with the generators {sorted(saved)}, this loader has "
                f"{sorted(self._generators)}; build the loader and its sampler as they were when it was saved"
            )
        for path, generator in self._generators.items():
            set_state(generator, saved[path])
        self._counters.restore(origin["counters"])

    def begin(self, epoch: int) -> None:
        """Fix the order of `epoch` from the random states of this moment, drawing as a plain loader does."""
        indices = self._draw(epoch)
        self._indices = indices
        self._ahead = next(indices, _END)
        if self._isolated:
            self._side = SideStream(mixed(self.base_seed, _SAMPLER_STREAM))

    def _draw(self, epoch: int) -> Iterator[Any]:
        """Draw the epoch's base seed, and take the sampler's iterator."""
        self._epoch = epoch
        self.taken = 0
        self._side = None
        for sampler in (self._loader.sampler, *chain(self._sampler, "sampler").values()):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        indices: Iterator[Any] = iter(self._sampler)
        self.base_seed = draw_base_seed(self._loader)
        for _ in range(self.passes - 1):
            indices = iter(self._sampler)
        return indices

    def replay(self, epoch: int, origin: dict[str, Any], position: int) -> None:
        """Stand before task `position` of the epoch that began at `origin`; the global states do not move.

        Only the sampler is iterated. Raises DataError if the epoch has fewer than `position` tasks.
        """
        main = take_globals()
        try:
            restore_globals(origin)
            self.restore(origin)
            if type(self._sampler) is BatchSampler and not self._isolated:
                self._begin_at(epoch, position, self._sampler)
            else:
                self.begin(epoch)
        finally:
            put_globals(main)
        with self._side or nullcontext():
            self._skip(position - self.taken)

    def _begin_at(self, epoch: int, position: int, batches: BatchSampler) -> None:
        """Begin `epoch` before task `position`, or at its end where there are fewer.

        Torch's BatchSampler keeps nothing from one list to the next but its sampler's iterator: skipping
        indices there gives the same lists, and is several times as fast as making lists to throw away.
        """
        self._draw(epoch)
        indices = iter(batches.sampler)
        skipped = _skipped(indices, position * batches.batch_size)
        self.taken, rest = divmod(skipped, batches.batch_size)
        if rest and not batches.drop_last:
            self.taken += 1
        self._indices = iter(BatchSampler(_Rest(indices), batches.batch_size, batches.drop_last))
        self._ahead = next(self._indices, _END)

    def _skip(self, count: int) -> None:
        """Pass over `count` tasks, the one ahead included."""
        if count == 0:
            return
        skipped = 0
        if self._ahead is not _END:
            skipped = 1 + _skipped(self._indices, count - 1)
            self._ahead = next(self._indices, _END) if skipped == count else _END
        self.taken += skipped
        if skipped < count:
            raise DataError(
                f"the saved position is after batch {self.taken - skipped + count - 1} of epoch {self._epoch}, but "
                f"now the epoch has {self.taken} batches; give the data set, sampler and batch size that it was "
                "saved with"
            )

    def _find_generators(self) -> dict[str, Generator]:
        roots = {"generator": self._loader.generator, "sampler": self._sampler}
        return find_generators(roots, outside=[self._loader.dataset]).seedable


class _Rest:
    """A sampler that goes on where its iterator stands."""

    def __init__(self, indices: Iterator[Any]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[Any]:
        return self._indices


def _skipped(iterator: Iterator[Any], count: int) -> int:
    """Take up to `count` items from `iterator`, without a step of Python for each; how many there were."""
    last = deque(enumerate(islice(iterator, count), 1), maxlen=1)
    return last[0][0] if last else 0


def _draws_before_first(sampler: Any) -> bool:
    """Whether `sampler` is known to draw nothing from global generators after its first index."""
    if type(sampler) is BatchSampler:
        return _draws_before_first(sampler.sampler)
    return (
        type(sampler) in _DRAW_BEFORE_FIRST
        and getattr(sampler, "generator", None) is not torch.default_generator
    )


def length_of(sampler: Any) -> int | None:
    """The length that a sampler, or a loader, says it has; None if it does not say."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None
