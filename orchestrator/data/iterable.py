"""Batches of an iterable data set: pulled in turn from each worker, and reached again by state or by loading."""

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert, get_worker_info

from orchestrator.data.batches import pinned
from orchestrator.data.counters import Counters, chain
from orchestrator.data.errors import DataError
from orchestrator.data.fingerprint import fingerprint_iterable
from orchestrator.data.generators import (
    Found,
    Generator,
    find_consumed,
    find_generators,
    get_state,
    seed_generator,
    set_state,
    warn_of_unseeded,
)
from orchestrator.data.loading import can_pin, close_at_exit, end_workers, outlived_sigterm, rebuilt
from orchestrator.data.order import draw_base_seed, length_of
from orchestrator.data.randomness import mixed, put_globals, seed_globals, take_globals
from orchestrator.errors import kind_of
from orchestrator.warning import warn

__all__ = ["IterableSource"]

_BEGINNING = -1  # beside the batches' streams, which are numbered from 0
_END = object()


class Pulled(NamedTuple):
    """A batch, the worker that made it, and the state of that worker's data set after it, pickled."""

    batch: Any
    worker: int
    state: bytes | None


@dataclass(frozen=True)
class Stand:
    """Where the workers stand before a batch.

    A state is the one that a worker's data set had after the last batch it gave; None if it has no
    `state_dict`, or gave no batch yet. With no batch given and no worker process it may be the state that the
    epoch before ended with.
    """

    turn: int
    given: tuple[int, ...]
    states: tuple[bytes | None, ...]

    def after(self, pulled: Pulled) -> "Stand":
        """Where they stand when `pulled` was given."""
        given, states = list(self.given), list(self.states)
        given[pulled.worker] += 1
        states[pulled.worker] = pulled.state
        return Stand((pulled.worker + 1) % len(given), tuple(given), tuple(states))

    def loaded_again(self) -> int:
        """How many batches must be loaded again to stand there."""
        return sum(given for given, state in zip(self.given, self.states, strict=True) if state is None)

    def as_tree(self) -> dict[str, Any]:
        """As plain values and what the states hold."""
        states = [None if state is None else pickle.loads(state) for state in self.states]
        return {"turn": self.turn, "given": list(self.given), "states": states}

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> "Stand":
        """What `as_tree` made a tree of."""
        states = (None if state is None else pickle.dumps(state) for state in tree["states"])
        return cls(tree["turn"], tuple(tree["given"]), tuple(states))


@dataclass(frozen=True)
class Recipe:
    """What of a loader makes its batches."""

    dataset: Any
    collate_fn: Callable[[Any], Any]
    batch_size: int | None
    drop_last: bool

    def find_generators(self) -> Found:
        """The generators that the data set and the collate function own."""
        return find_generators({"dataset": self.dataset, "collate_fn": self.collate_fn})


class Puller:
    """The batches of one pass over the data set, as one worker makes them, each from a random stream of its own.

    The global generators are seeded before each batch, by the epoch's base seed, the worker and the number of
    the batch within the worker. Generators that the data set owns run on from batch to batch.
    """

    def __init__(self, recipe: Recipe, worker: int) -> None:
        self._recipe = recipe
        self._dataset = recipe.dataset
        self._collates_still = recipe.collate_fn in (default_collate, default_convert)
        self._worker = worker
        self._bits = np.random.MT19937(0)
        self._owned: dict[str, Generator] = {}
        self._items: Any = iter(())
        self._seed = 0
        self._made = 0
        self._ended = False

    def start(self, base_seed: int, given: int, state: bytes | None) -> None:
        """Stand after `given` batches: by `state`, or by loading them again. Raises DataError if it cannot."""
        self._seed = mixed(base_seed, self._worker)
        self._made, self._ended = 0, False
        self._seed_globals(_BEGINNING)
        self._owned = self._recipe.find_generators().seedable
        if state is None:
            self._items = iter(self._dataset)
            while self._made < given:
                self._pass_over(given)
        else:
            self._load(state)
            self._made = given

    def pull(self) -> Pulled | None:
        """The next batch; None at the end."""
        self._seed_globals(self._made)
        found = self._take()
        if found is _END:
            return None
        batch = self._recipe.collate_fn(found)
        self._made += 1
        return Pulled(batch, self._worker, self._state())

    def drain(self, state: bytes) -> None:
        """Bring the data set, whose pass ended with `state`, to the end of that pass again."""
        self._seed_globals(_BEGINNING)
        self._owned = self._recipe.find_generators().seedable
        self._load(state)
        size = self._recipe.batch_size or 1
        left = len(self._up_to(size))
        if left and (left == size or not self._recipe.drop_last):
            raise DataError(
                f"the data set's load_state_dict was given the state of its end, but {type(self._dataset).__name__} "
                "gave another item; expected it to go on after the last item: see to its state_dict"
            )

    def _seed_globals(self, number: int) -> None:
        seed_globals(mixed(self._seed, number), self._bits)

    def _take(self) -> Any:
        """The items of the next batch, or the next item where there is no batching; _END at the end."""
        size = self._recipe.batch_size
        if self._ended:
            return _END
        if size is None:
            return next(self._items, _END)
        items = self._up_to(size)
        self._ended = len(items) < size
        return _END if not items or (self._ended and self._recipe.drop_last) else items

    def _up_to(self, count: int) -> list[Any]:
        """The next items, with `next` alone: taking the iterator's iterator may begin anew."""
        items: list[Any] = []
        while len(items) < count and (item := next(self._items, _END)) is not _END:
            items.append(item)
        return items

    def _pass_over(self, given: int) -> None:
        self._seed_globals(self._made)
        found = self._take()
        if found is _END:
            raise DataError(
                f"the saved position is after {given} batches of this worker, but now its epoch has {self._made}; give "
                "the data set and batch size that it was saved with"
            )
        if not self._collates_still:
            self._recipe.collate_fn(found)
        self._made += 1

    def _state(self) -> bytes | None:
        """The state of the data set and its iterator, if either has one; pickled at once, since it may be live."""
        whole, iterator = _is_stateful(self._dataset), _is_stateful(self._items)
        if not whole and not iterator:
            return None
        apart = self._items is not self._dataset
        return pickle.dumps(
            {
                "dataset": self._dataset.state_dict() if whole and apart else None,
                "iterator": self._items.state_dict() if iterator else None,
                "generators": {path: get_state(owned) for path, owned in self._owned.items()},
            }
        )

    def _load(self, state: bytes) -> None:
        saved = pickle.loads(state)
        if saved["dataset"] is not None:
            _load_state(self._dataset, saved["dataset"])
        self._items = iter(self._dataset)
        if saved["iterator"] is not None:
            _load_state(self._items, saved["iterator"])
        for path, owned in self._owned.items():
            if path in saved["generators"]:
                set_state(owned, saved["generators"][path])


def _is_stateful(item: Any) -> bool:
    return callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))


def _load_state(item: Any, state: Any) -> None:
    if not _is_stateful(item):
        raise DataError(
            f"the saved position of the data is a state of its data set, but {type(item).__name__} has no "
            "load_state_dict; give the data set that it was saved with"
        )
    item.load_state_dict(state)


class WorkerBatches(IterableDataset[Any]):
    """An iterable data set of what a Puller pulls in a data worker."""

    def __init__(self, recipe: Recipe, base_seed: int, stand: Stand) -> None:
        self.dataset = recipe.dataset
        self._recipe = recipe
        self._base_seed = base_seed
        self._stand = stand

    def __iter__(self) -> Iterator[Pulled]:
        info = get_worker_info()
        assert info is not None
        puller = Puller(self._recipe, info.id)
        puller.start(self._base_seed, self._stand.given[info.id], self._stand.states[info.id])
        while (pulled := puller.pull()) is not None:
            yield pulled
            outlived_sigterm()


class IterableSource:
    """A DataLoader over an iterable data set, with one batch of look-ahead.

    A worker's share of an epoch depends on the data set, on how many workers there are, and on the epoch's
    base seed: by that seed the global generators are seeded anew for each batch, and the generators that the
    data set and the collate function own once an epoch, alike for all workers, before these start and before
    `worker_init_fn` is called. Workers start anew each epoch.
    """

    waiting = False
    looks_ahead = False  # it has made the next batch already

    def __init__(self, loader: DataLoader[Any], role: str) -> None:
        self._loader = loader
        self._role = role
        self._recipe = Recipe(loader.dataset, loader.collate_fn, loader.batch_size, loader.drop_last)
        self._puller = Puller(self._recipe, 0)
        self._counters = Counters(chain(loader.dataset, "dataset"))
        self._pins = loader.num_workers == 0 and loader.pin_memory and can_pin()
        self.passes = 1
        self._ahead: Any = _END
        """A Pulled, the exception that came in its place, or _END."""
        self._stands = {0: self._beginning()}
        self._position = 0
        self._end: tuple[int, dict[str, Any]] | None = None
        """Where the epoch at hand ended when it was saved, and what the data set counted then."""
        self._begun = False
        self._batches: Any = None
        self._owned: dict[str, Generator] = {}
        self._own_states: dict[str, Any] = {}
        self._pid = os.getpid()
        self._consumed = find_consumed(loader.dataset, "dataset")
        self._warn()
        if loader.num_workers > 0:
            close_at_exit(self)

    @property
    def length(self) -> int | None:
        """The number of batches that the loader expects; with several workers no more than a guess."""
        return length_of(self._loader)

    def has_next(self, position: int) -> bool:
        """Whether there is another batch: known from the look-ahead."""
        return self._ahead is not _END

    def record(self) -> dict[str, Any]:
        """The random states that the next epoch is fixed by, and what the data set counts."""
        generator = self._loader.generator
        return {
            "torch": torch.get_rng_state(),
            "generators": {} if generator is None else {"generator": generator.get_state()},
            "counters": self._counters.changed(),
        }

    def restore(self, origin: dict[str, Any]) -> None:
        """Stand before any epoch, with the loader's generator and what the data set counts back at `origin`."""
        self._set(origin)
        self._stands, self._position, self._ahead = {0: self._beginning()}, 0, _END

    def _set(self, origin: dict[str, Any]) -> None:
        generator, saved = self._loader.generator, origin["generators"]
        if (generator is not None) != ("generator" in saved):
            raise DataError(
                f"the saved order of the data was drawn with {'a' if 'generator' in saved else 'no'} generator of the "
                f"loader's own, this loader has {'none' if generator is None else 'one'}; build it as it was when it "
                "was saved"
            )
        if generator is not None:
            generator.set_state(saved["generator"])
        self._counters.restore(origin["counters"])

    def begin(self, epoch: int) -> None:
        """Begin `epoch` and load its first batch. Where that is broken off, nothing has changed."""
        origin, stands = self.record(), self._stands
        beginning = self._beginning()
        if self._loader.num_workers == 0 and self._ahead is _END:
            beginning = replace(beginning, states=stands[max(stands)].states)
        try:
            self._set_epoch(epoch)
            base_seed = draw_base_seed(self._loader)
            self._open(base_seed, self._beginning())
        except BaseException:
            self.close()
            self._set(origin)
            torch.set_rng_state(origin["torch"])
            raise
        self._stands, self._position, self._end = {0: beginning}, 0, None

    def replay(self, epoch: int, origin: dict[str, Any], position: int, place: dict[str, Any]) -> None:
        """Stand before batch `position` of the epoch that began at `origin`; the global states do not move."""
        if place["workers"] != self._loader.num_workers:
            raise DataError(
                f"the saved position of the {self._role} data was reached with num_workers={place['workers']}, now it "
                f"is {self._loader.num_workers}; expected the same number, on which the order of an iterable data "
                "set depends"
            )
        stands = {tree["position"]: Stand.of_tree(tree) for tree in place["stands"]}
        if position not in stands:
            raise DataError(
                f"found a state for the positions {sorted(stands)} of an iterable data set; expected one for "
                f"{position}: only where it was saved, or a batch before, can it stand again"
            )
        stand, main = stands[position], torch.get_rng_state()
        try:
            self._drain_epoch_before(stand)
            self._set(origin)
            self._set_epoch(epoch)
            torch.set_rng_state(origin["torch"])
            base_seed = draw_base_seed(self._loader)
        finally:
            torch.set_rng_state(main)
        if place["ended"] and position == max(stands) and not self._goes_on_from(stand):
            self._ahead = _END
        else:
            self._open_again(epoch, base_seed, stand if any(stand.given) else self._beginning())
        self._stands, self._position = stands, position
        self._end = (max(stands), place["counters"]) if place["ended"] else None
        self._count_as_at_end()

    def place(self) -> dict[str, Any]:
        """What, beside `origin`, says where this stands: before the next batch, or before the last one given."""
        return {
            "workers": self._loader.num_workers,
            "ended": self._ahead is _END,
            "counters": self._counters.changed() if self._ahead is _END else {},
            "stands": [
                {"position": position, **stand.as_tree()} for position, stand in sorted(self._stands.items())
            ],
        }

    def next(self) -> Any:
        """The batch that was loaded ahead, once the one after it is loaded or known not to be there."""
        if isinstance(self._ahead, Exception):
            raise self._ahead
        pulled: Pulled = self._ahead
        ahead = self._pull()
        stand = self._stands[self._position]
        self._stands = {self._position: stand, self._position + 1: stand.after(pulled)}
        self._position += 1
        self._ahead = ahead
        self._count_as_at_end()
        return pinned(pulled.batch) if self._pins else pulled.batch

    def _count_as_at_end(self) -> None:
        if self._ahead is _END and self._end is not None and self._end[0] == self._position:
            self._counters.restore(self._end[1])

    def end_epoch(self) -> None:
        """End the workers."""
        self.close()

    def close(self) -> None:
        """End the workers. What comes next is still known, but must be loaded again."""
        if os.getpid() == self._pid:  # a forked child has no say over them
            batches, self._batches = self._batches, None
            end_workers(batches)

    @property
    def data(self) -> Any:
        """What the batches come from."""
        return self._loader.dataset

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another; its first item is read unless something is used up by that."""
        # In this process, reading could disturb a pass that is under way.
        free = self._loader.num_workers > 0 or not self._begun
        return fingerprint_iterable(self._loader, self._role, read=free and not self._consumed)

    # -- opening ---------------------------------------------------------------------------------

    def _beginning(self) -> Stand:
        workers = max(self._loader.num_workers, 1)
        return Stand(0, (0,) * workers, (None,) * workers)

    def _open(self, base_seed: int, stand: Stand) -> None:
        """Begin a pass at `stand` and load a batch ahead."""
        self.close()
        self._begun = True
        self._find_owned()
        with self._aside():
            for path, owned in self._owned.items():
                seed_generator(owned, path, mixed(base_seed, _BEGINNING))
            if self._loader.num_workers > 0:
                self._start_workers(base_seed, stand)
            else:
                self._puller.start(base_seed, stand.given[0], stand.states[0])
        self._ahead = self._pull()

    def _open_again(self, epoch: int, base_seed: int, stand: Stand) -> None:
        """As `_open`, saying what it costs where batches must be loaded again."""
        again, started = stand.loaded_again(), time.perf_counter()
        if again:
            warn(
                f"{self._role} data: {again} batches of epoch {epoch} are loaded again and thrown away to go on where "
                f"it stood, since {type(self._loader.dataset).__name__} has no state_dict and load_state_dict"
            )
        self._open(base_seed, stand)
        if isinstance(self._ahead, DataError):
            raise self._ahead
        if again:
            seconds = time.perf_counter() - started
            warn(f"{self._role} data: loading {again} batches again took {seconds:.1f} s")

    def _start_workers(self, base_seed: int, stand: Stand) -> None:
        generator = torch.Generator().manual_seed(base_seed)
        batches = WorkerBatches(self._recipe, base_seed, stand)
        self._batches = iter(
            rebuilt(self._loader, batches, None, generator=generator, one_pass=True, shift=stand.turn)
        )

    def _find_owned(self) -> None:
        self._owned, self._own_states = self._recipe.find_generators().seedable, {}

    def _set_epoch(self, epoch: int) -> None:
        for dataset in chain(self._loader.dataset, "dataset").values():
            set_epoch = getattr(dataset, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def _goes_on_from(self, stand: Stand) -> bool:
        """Whether the next epoch begins from the state that the data set has at the end of this one."""
        return self._loader.num_workers == 0 and stand.given[0] > 0 and stand.states[0] is not None

    def _drain_epoch_before(self, stand: Stand) -> None:
        """Before the first batch of a pass in this process: be where the epoch before ended."""
        if stand.given[0] == 0 and stand.states[0] is not None:
            self._find_owned()
            with self._aside():
                self._puller.drain(stand.states[0])

    # -- pulling ---------------------------------------------------------------------------------

    def _pull(self) -> Any:
        """The next Pulled, an Exception that came in its place, to be raised when its turn comes, or _END."""
        try:
            return self._pull_here() if self._loader.num_workers == 0 else self._wait()
        except Exception as error:
            return error

    def _pull_here(self) -> Any:
        with self._aside():
            pulled = self._puller.pull()
        return _END if pulled is None else pulled

    def _wait(self) -> Any:
        self.waiting = True
        try:
            return next(self._batches, _END)
        finally:
            self.waiting = False

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Let the data set draw from its own course of the random streams; the main ones do not move."""
        main = take_globals()
        kept = {path: get_state(owned) for path, owned in self._owned.items()}
        try:
            for path, state in self._own_states.items():
                set_state(self._owned[path], state)
            yield
        finally:
            self._own_states = {path: get_state(owned) for path, owned in self._owned.items()}
            for path, state in kept.items():
                set_state(self._owned[path], state)
            put_globals(main)

    def _warn(self) -> None:
        warn_of_unseeded(self._recipe.find_generators(), self._role)
        dataset = self._loader.dataset
        if not _is_stateful(dataset):
            for path, item in self._consumed.items():
                if item is not dataset:
                    warn(
                        f"{self._role} data: {path}, {kind_of(item)}, is used up by reading, so that a resumed "
                        "run is exact only in its first epoch and in a new process; make it in the data set's __iter__"
                    )
        if self._loader.persistent_workers:
            warn(
                f"{self._role} data: persistent_workers=True is not kept for an iterable data set: its workers start "
                "anew each epoch, or a resumed run would not be exact; leave it out"
            )
