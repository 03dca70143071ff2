"""BatchStream: the batches of one loader, addressed by (epoch, index), the same one every time."""

import types
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from orchestrator.data.acceptance import check_loader
from orchestrator.data.carrying import Carry
from orchestrator.data.errors import DataError
from orchestrator.data.fingerprint import fingerprint_loader, fingerprint_sequence
from orchestrator.data.generators import warn_of_unseeded
from orchestrator.data.iterable import IterableSource
from orchestrator.data.loading import BatchMaker, Loading
from orchestrator.data.order import Order

__all__ = ["BatchStream"]

_VERSION = 1
_FAR = 20_000
_NO_DATA = (str, bytes, int, float, type, types.ModuleType, types.FunctionType)


class BatchStream:
    """The batches of one loader, one epoch after another, each the same whenever and wherever it is made.

    `loader` is a `torch.utils.data.DataLoader` (torchdata's StatefulDataLoader among them) or a list or tuple of
    batches. `role` names it in messages. `in_order=False`, loaders that iterate in a way of their own, and
    iterators that can be gone through but once are refused (DataError).

        stream = BatchStream(loader)
        stream.begin_epoch(0)  # fixes the order, from the random states of this moment
        while stream.has_next:
            batch = stream.fetch()

    Order and random states are those of `for batch in loader` written by hand: `begin_epoch` draws one base
    seed and lets the sampler draw where the plain loader's iterator would. What the data set and the collate
    function draw, from the global generators (torch CPU, Python, NumPy's legacy one) or from generators that
    they own, comes from a stream for each batch, so a batch depends neither on the number of workers nor on
    what was drawn meanwhile elsewhere. A generator given to the loader or its sampler is restored with the
    stream: nothing else may draw from it.

    An iterable data set is read one batch ahead. It stands again by its own `state_dict` and `load_state_dict`,
    or its iterator's; without them by loading and throwing away what came before, which is warned of. Its batches
    depend on the number of workers, which must stay the same. See `IterableSource` for its random streams.

    A failed `fetch` (an exception of the data set, a signal) leaves the stream before the batch that failed.
    """

    def __init__(self, loader: Any, *, role: str = "training") -> None:
        self.role = role
        self._source = _source(loader, role)
        self._epoch: int | None = None
        self._position = 0
        self.has_next = False
        """Whether the epoch has another batch; known without waiting. False before any epoch."""
        self._origin = self._source.record()
        self._stands = True
        self._fingerprint: dict[str, Any] | None = None
        self._carry: Carry | None = None
        self._ahead: list[Any] = []
        """What gives the batch after the one fetched last, which is on its way; or the exception that it made."""

    def carry_by(self, carry: Carry) -> None:
        """Let `carry` move each batch to a device, and begin with the next one while this one is used.

        Looking ahead changes no batch where workers make them ahead anyway, or making them draws nothing; elsewhere
        each is carried when it is fetched. Nothing of it is in a state: what was carried in vain is made again.
        """
        self._carry = carry

    @property
    def length(self) -> int | None:
        """The number of batches of an epoch; None if the loader does not know."""
        return self._source.length

    @property
    def epoch(self) -> int | None:
        """The epoch begun last; None before any."""
        return self._epoch

    @property
    def position(self) -> int:
        """The index, within its epoch, of the batch that `fetch` gives next."""
        return self._position

    @property
    def waiting(self) -> bool:
        """Whether `fetch` is at this moment waiting for a data worker.

        A signal handler may then raise: the stream stays before this batch, and nothing is lost.
        """
        return self._source.waiting

    def begin_epoch(self, epoch: int) -> None:
        """Fix the order of `epoch` from the random states of this moment; drop what is left of the one
        before."""
        self._drop_epoch()
        self._stands = False
        origin = self._source.record()
        self._source.begin(epoch)
        self._origin, self._epoch, self._position, self._stands = origin, epoch, 0, True
        self.has_next = self._source.has_next(0)

    def fetch(self) -> Any:
        """The next batch, as the loader makes it (None if its collate function returns None).

        Raises DataError where there is none; an exception of the data set or a worker passes through.
        """
        if not self.has_next:
            raise DataError(
                f"there is no batch {self._position} in epoch {self._epoch}; look at has_next before fetching"
                if self._epoch is not None
                else "no epoch was begun; call begin_epoch before fetching"
            )
        if not self._stands:
            self._stand(self._source.place())
        try:
            if self._carry is None:
                batch = self._source.next()
            else:
                batch = self._carried(self._carry)
                if self._source.looks_ahead:
                    self._look_ahead(self._carry)
        except BaseException:
            # Tearing down takes seconds where a worker is stuck: that waits until the stream is used again,
            # or closed.
            self._stands = False
            raise
        self._position += 1
        self.has_next = self._source.has_next(self._position)
        if not self.has_next:
            self._source.end_epoch()
        return batch

    def _carried(self, carry: Carry) -> Any:
        """The next batch, on the device."""
        if not self._ahead:
            return carry(self._source.next())()
        batch = self._ahead.pop()
        if isinstance(batch, _Failed):
            raise batch.error
        return batch()

    def _look_ahead(self, carry: Carry) -> None:
        """Begin to carry the batch after the one at hand; an error that it makes is raised when its turn comes."""
        if not self._source.has_next(self._position + 1):
            return
        try:
            self._ahead.append(carry(self._source.next()))
        except Exception as error:
            self._ahead.append(_Failed(error))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: epoch, position, and the random states that fixed the epoch's order.

        Plain values, arrays and tensors, 5 to 20 kB, beside what an iterable data set says of itself.
        """
        if self._epoch is None:
            return self.between_epochs()
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "passes": self._source.passes,
            "origin": self._origin,
            "place": self._source.place(),
        }

    def between_epochs(self) -> dict[str, Any]:
        """The state of the generators alone: `load_state_dict` sets them, and stands before any epoch."""
        return {
            "version": _VERSION,
            "epoch": None,
            "position": 0,
            "passes": self._source.passes,
            "origin": self._source.record(),
            "place": {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand after batch `position` - 1 of the saved epoch again, loading nothing: only the sampler is
        iterated. (An iterable data set loads the next batch, and those before it if it has no state; it can stand
        where it was saved, or at `position` - 1 of that.)

        The global random states are left alone; generators of the loader and the sampler are set. Raises
        DataError if the epoch turns out shorter than the saved position, or the generators are not those that
        were saved.
        """
        if state["version"] != _VERSION:
            raise DataError(
                f"found the state of a data stream in version {state['version']}, this is version "
                f"{_VERSION}; "
                "resume with the version of interlock that saved it"
            )
        self._drop_epoch()
        self._source.passes = state["passes"]
        self._epoch, self._position, self._origin = state["epoch"], state["position"], state["origin"]
        self._stand(state["place"])

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data, as plain values (see `compare_fingerprints`); taken once.

        Reads the first and the last item of the data set. The number of workers is part of it only for iterable
        data sets.
        """
        if self._fingerprint is None:
            self._fingerprint = self._source.fingerprint()
        return self._fingerprint

    def holds(self, tensors: list[torch.Tensor]) -> bool:
        """Whether one of `tensors`, which were in a batch, is memory of the data themselves."""
        theirs = _storages(self._source.data)
        return any(_address(tensor) in theirs for tensor in tensors)

    def close(self) -> None:
        """End the data workers. The stream keeps its place, and a later `fetch` starts new ones."""
        self._ahead.clear()
        self._source.close()
        self._stands = False

    def _drop_epoch(self) -> None:
        """Give up what is left of an epoch; after a failure the workers, even persistent ones, with it."""
        self._ahead.clear()
        if self._stands:
            self._source.end_epoch()
        else:
            self._source.close()

    def _stand(self, place: dict[str, Any]) -> None:
        """Bring the source, whatever it was doing, to this stream's epoch and position."""
        self._ahead.clear()
        if not self._stands:
            self._source.close()
        if self._epoch is None:
            self._source.restore(self._origin)
        else:
            self._source.replay(self._epoch, self._origin, self._position, place)
        self._stands = True
        self.has_next = self._epoch is not None and self._source.has_next(self._position)


class _Failed:
    """An exception in place of a batch."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Source(Protocol):
    """Where a stream's batches come from."""

    passes: int

    @property
    def looks_ahead(self) -> bool: ...

    @property
    def data(self) -> Any: ...
    @property
    def length(self) -> int | None: ...
    @property
    def waiting(self) -> bool: ...
    def has_next(self, position: int) -> bool: ...
    def record(self) -> dict[str, Any]: ...
    def restore(self, origin: dict[str, Any]) -> None: ...
    def begin(self, epoch: int) -> None: ...
    def replay(self, epoch: int, origin: dict[str, Any], position: int, place: dict[str, Any]) -> None: ...
    def place(self) -> dict[str, Any]: ...
    def next(self) -> Any: ...
    def end_epoch(self) -> None: ...
    def close(self) -> None: ...
    def fingerprint(self) -> dict[str, Any]: ...


class _SequenceSource:
    """A list or tuple of batches: no order to draw, and nothing to make."""

    waiting = looks_ahead = False

    def __init__(self, batches: list[Any] | tuple[Any, ...]) -> None:
        self._batches = batches
        self._next = 0
        self.passes = 1

    @property
    def data(self) -> Any:
        return self._batches

    @property
    def length(self) -> int:
        return len(self._batches)

    def has_next(self, position: int) -> bool:
        return position < len(self._batches)

    def record(self) -> dict[str, Any]:
        return {}

    def restore(self, origin: dict[str, Any]) -> None:
        self._next = 0

    def begin(self, epoch: int) -> None:
        self._next = 0

    def replay(self, epoch: int, origin: dict[str, Any], position: int, place: dict[str, Any]) -> None:
        if position > len(self._batches):
            raise DataError(
                f"the saved position is after batch {position - 1}, but the sequence now has "
                f"{len(self._batches)} "
                "batches; give the batches that it was saved with"
            )
        self._next = position

    def place(self) -> dict[str, Any]:
        return {}

    def next(self) -> Any:
        self._next += 1
        return self._batches[self._next - 1]

    def end_epoch(self) -> None:
        pass

    def close(self) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_sequence(self._batches)


class _LoaderSource:
    """A DataLoader over a map-style data set."""

    def __init__(self, loader: DataLoader[Any], role: str) -> None:
        self._loader = loader
        self._role = role
        self._order = Order(loader)
        self._maker = BatchMaker(loader, role)
        self._loading = Loading(loader, self._order, self._maker)
        warn_of_unseeded(self._maker.find_generators(), role)

    @property
    def looks_ahead(self) -> bool:
        return self._loader.num_workers > 0 or self._maker.still

    @property
    def data(self) -> Any:
        return self._loader.dataset

    @property
    def passes(self) -> int:
        return self._order.passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self._order.passes = passes

    @property
    def length(self) -> int | None:
        return self._order.length

    @property
    def waiting(self) -> bool:
        return self._loading.waiting

    def has_next(self, position: int) -> bool:
        return self._order.has_next or position < self._order.taken

    def record(self) -> dict[str, Any]:
        return self._order.record()

    def restore(self, origin: dict[str, Any]) -> None:
        self._order.restore(origin)

    def begin(self, epoch: int) -> None:
        self._order.begin(epoch)

    def replay(self, epoch: int, origin: dict[str, Any], position: int, place: dict[str, Any]) -> None:
        self._order.replay(epoch, origin, position)

    def place(self) -> dict[str, Any]:
        return {}

    def next(self) -> Any:
        return self._loading.next()

    def end_epoch(self) -> None:
        self._loading.end_epoch()

    def close(self) -> None:
        self._loading.close()

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_loader(self._loader, self.length, self._role)


def _address(tensor: torch.Tensor) -> int:
    """Where the memory of `tensor` begins; 0 where it has none of its own kind, as a sparse one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _storages(data: Any) -> set[int]:
    """The addresses of the tensors in `data`: attributes and containers are followed, 20,000 objects far."""
    found: set[int] = set()
    seen: set[int] = set()
    ahead = [data]
    while ahead and len(seen) < _FAR:
        item = ahead.pop()
        if isinstance(item, torch.Tensor):
            found.add(_address(item))
        elif id(item) not in seen and not isinstance(item, _NO_DATA):
            seen.add(id(item))
            inside = (
                item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
            )
            ahead += [*list(inside)[:_FAR], *getattr(item, "__dict__", {}).values()]
    return found - {0}


def _source(loader: Any, role: str) -> _Source:
    if isinstance(loader, list | tuple):
        return _SequenceSource(loader)
    check_loader(loader, role)
    return (IterableSource if isinstance(loader.dataset, IterableDataset) else _LoaderSource)(loader, role)
