"""Batches of iterable data sets: resumed at every position they equal an unbroken pass, or it is said or refused."""

import itertools
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, get_worker_info

from orchestrator.data import BatchStream, DataError, compare_fingerprints
from orchestrator.data.fingerprint import digest

LENGTH = 19


def noisy_collate(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + torch.rand(()) + np.random.randn() + random.random()


class Streamed(IterableDataset):
    """Shards by get_worker_info(), shuffles with a generator of its own, and draws from every generator there is."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.rng = np.random.default_rng(3)
        self.old = [random.Random(4)]

    def share(self) -> Any:
        info = get_worker_info()
        assert info is None or info.dataset is self
        return self.rng.permutation(self.length)[(info.id if info else 0) :: info.num_workers if info else 1]

    def item(self, index: int) -> torch.Tensor:
        drawn = [
            torch.rand(()).item(),
            random.random(),
            np.random.randn(),
            self.rng.random(),
            self.old[0].random(),
        ]
        return torch.tensor([float(index), *drawn], dtype=torch.float64)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in self.share():
            yield self.item(index)


class Counting(Streamed):
    """Another order each epoch, from a counter of its own; lets its last items go."""

    rounds = 0

    def share(self) -> Any:
        self.rounds += 1
        return (super().share() + self.rounds) % self.length


class Stateful(Streamed):
    """Goes on by its own state, in the way of torchdata's examples: stale until the first item."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__(length)
        self.given = 0
        self.resume: int | None = None
        self.log: list[int] = []  # a state that is no plain value, and outlives epochs
        self.made = 0

    def share(self) -> Any:
        info = get_worker_info()
        return range(self.length)[(info.id if info else 0) :: info.num_workers if info else 1]

    def __iter__(self) -> Iterator[torch.Tensor]:
        share, start, self.resume = self.share(), self.resume or 0, None
        for self.given in range(start + 1, len(share) + 1):
            self.made += 1
            self.log.append(share[self.given - 1])
            yield self.item(share[self.given - 1] + len(self.log))

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resume, self.given, self.log = state["given"], state["given"], state["log"]


class Iterating:
    """A stateful iterator over a data set without a state."""

    def __init__(self, data: Streamed) -> None:
        self.data = data
        self.share = list(data.share())

    def __iter__(self) -> "Iterating":
        return self

    def __next__(self) -> torch.Tensor:
        if not self.share:
            raise StopIteration
        return self.data.item(self.share.pop(0))

    def state_dict(self) -> dict[str, Any]:
        return {"share": [int(index) for index in self.share]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share = list(state["share"])


class StatefulIterator(Streamed):
    def __iter__(self) -> Any:
        return Iterating(self)


class Itself(Streamed):
    """Its iterator is itself, made new each epoch."""

    at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at = 0
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == self.length:
            raise StopIteration
        self.at += 1
        return self.item(self.at)


class SetEpoch(Streamed):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def share(self) -> Any:
        return (super().share() + self.epoch) % self.length


class Uneven(Streamed):
    """The first worker has one item, the last one none."""

    def share(self) -> Any:
        info = get_worker_info()
        assert info is not None
        return range([1, self.length, 6, 0][info.id])


STATELESS = [Streamed, Counting, Itself, SetEpoch]
STATEFUL = [Stateful, StatefulIterator]

Build = Callable[..., DataLoader[Any]]


def loader(kind: type[Streamed], **options: Any) -> DataLoader[Any]:
    return DataLoader(kind(), **{"batch_size": 4, "collate_fn": noisy_collate, **options})


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def between() -> str:
    """What a training draws between two batches."""
    return digest([torch.rand(3), random.random(), np.random.randn()])


Passage = list[tuple[int, int, dict[str, Any], Any, str]]


def passage(stream: BatchStream, epochs: int = 3) -> Passage:
    """(epoch, position, state, batch, what is drawn after it) from beginning to end, ends of epochs included."""
    seen: Passage = []
    for epoch in range(epochs):
        stream.begin_epoch(epoch)
        while stream.has_next:
            position, state = stream.position, stream.state_dict()
            seen.append((epoch, position, state, stream.fetch(), between()))
        seen.append((epoch, stream.position, stream.state_dict(), None, ""))
    stream.close()
    return seen


def rest(stream: BatchStream, epochs: int = 3) -> list[Any]:
    """The batches that are left, from wherever the stream stands, and what is drawn after each."""
    seen: list[Any] = []
    assert stream.epoch is not None
    for epoch in range(stream.epoch, epochs):
        if epoch > stream.epoch:
            stream.begin_epoch(epoch)
        while stream.has_next:
            seen += [digest(stream.fetch()), between()]
    stream.close()
    return seen


@pytest.mark.filterwarnings("ignore:training data. .*loaded again", "ignore:training data. loading")
def resumes(build: Build, *, cuts: slice = slice(None), epochs: int = 3) -> None:
    """At every position, in a new stream over a data set built anew, disturbed meanwhile."""
    seed_all(6)
    whole = passage(BatchStream(build()), epochs)
    seed_all(6)
    mains = []  # the main random states at each position
    stream = BatchStream(build())
    for epoch, position, *_ in whole:
        if position == 0:
            stream.begin_epoch(epoch)
        mains.append((torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)))
        if stream.has_next:
            stream.fetch()
            between()
    stream.close()
    for cut in range(len(whole))[cuts]:
        _, position, state, batch, _ = whole[cut]
        expected = [
            part for *_, made, drawn in whole[cut:] if made is not None for part in (digest(made), drawn)
        ]
        seed_all(99)
        again = BatchStream(build())
        again.load_state_dict(state)
        assert again.has_next == (batch is not None)
        assert digest(flat(again.state_dict())) == digest(flat(state))
        torch.set_rng_state(mains[cut][0])
        random.setstate(mains[cut][1])
        np.random.set_state(mains[cut][2])
        assert rest(again, epochs) == expected
        if position and cut % 2:  # a state with its batch at hand is loaded by taking that batch again
            again = BatchStream(build())
            again.load_state_dict({**state, "position": position - 1})
            assert digest(again.fetch()) == digest(whole[cut - 1][3])
            assert digest(flat(again.state_dict())) == digest(flat(state))
            again.close()


def flat(tree: Any) -> Any:
    if isinstance(tree, dict):
        return [part for key, value in sorted(tree.items()) for part in (str(key), flat(value))]
    return [flat(part) for part in tree] if isinstance(tree, list | tuple) else tree


quiet = pytest.mark.filterwarnings("ignore:training data")


@quiet
@pytest.mark.parametrize("kind", [*STATELESS, *STATEFUL])
@pytest.mark.parametrize(
    "options", [{}, {"drop_last": True}, {"batch_size": None, "collate_fn": None}], ids=str
)
def test_resumes_at_every_position(kind: type[Streamed], options: dict[str, Any]) -> None:
    resumes(lambda: loader(kind, **options), epochs=3 if "drop_last" in options else 2)


@quiet
@pytest.mark.parametrize("kind", [Streamed, Stateful, pytest.param(StatefulIterator, marks=pytest.mark.long)])
def test_resumes_with_workers(kind: type[Streamed]) -> None:
    resumes(lambda: loader(kind, num_workers=2), cuts=slice(None, None, 3), epochs=2)


@quiet
@pytest.mark.parametrize("kind", [Uneven, type("StatefulUneven", (Uneven, Stateful), {})])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resumes_where_workers_end_at_different_times(kind: type[Streamed]) -> None:
    resumes(lambda: loader(kind, num_workers=4, batch_size=2), cuts=slice(2, 9, 2), epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_comes_once_and_in_another_order_each_epoch(workers: int) -> None:
    """A permutation drawn from a generator of the data set's own is the same in all workers."""
    whole = passage(BatchStream(loader(Streamed, num_workers=workers, collate_fn=None)), epochs=2)
    orders = [
        torch.cat([m[:, 0] for e, *_, m, _ in whole if m is not None and e == epoch]) for epoch in (0, 1)
    ]
    assert [sorted(order.tolist()) for order in orders] == [[float(i) for i in range(LENGTH)]] * 2
    assert not torch.equal(*orders)
    drawn = torch.cat([made[:, 1] for *_, made, _ in whole if made is not None])
    assert len(drawn.unique()) == 2 * LENGTH


class Quiet(IterableDataset):
    """Draws nothing, as a reader of files."""

    def __iter__(self) -> Iterator[int]:
        yield from range(9)


@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_are_those_of_a_loop_by_hand(workers: int) -> None:
    seed_all(3)
    by_hand = [part for _ in range(2) for batch in DataLoader(Quiet(), 2, num_workers=workers)
               for part in (digest(batch), between())]  # fmt: skip
    seed_all(3)
    stream = BatchStream(DataLoader(Quiet(), 2, num_workers=workers))
    stream.begin_epoch(0)
    assert rest(stream, 2) == by_hand


def test_states_of_a_stateful_data_set_are_used_and_of_any_other_said_to_be_costly() -> None:
    streams = [BatchStream(loader(kind)) for kind in (Stateful, Streamed)]
    for stream in streams:
        stream.begin_epoch(0)
        for _ in range(3):
            stream.fetch()
    again = Stateful()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchStream(DataLoader(again, 4)).load_state_dict(streams[0].state_dict())
    assert again.made == 4  # the batch of look-ahead
    with pytest.warns(UserWarning, match="again") as said:
        BatchStream(loader(Streamed)).load_state_dict(streams[1].state_dict())
    assert str(said[0].message).startswith(
        "training data: 3 batches of epoch 0 are loaded again and thrown away"
    )
    assert "loading 3 batches again took 0." in str(said[1].message)


def test_an_epoch_that_is_over_is_not_loaded_again() -> None:
    stream = BatchStream(loader(Counting))
    stream.begin_epoch(0)
    rest(stream, 1)
    state = stream.state_dict()
    expected = passage(stream, 1)[0][3]
    data = Counting()
    again = BatchStream(DataLoader(data, 4, collate_fn=noisy_collate))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state)
    assert (again.has_next, data.rounds) == (False, 1)
    again.begin_epoch(1)
    assert again.fetch().shape == expected.shape


@pytest.mark.parametrize(("saved", "now"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", [Stateful, Streamed])
def test_another_number_of_workers_is_refused(kind: type[Streamed], saved: int, now: int) -> None:
    stream = BatchStream(loader(kind, num_workers=saved))
    stream.begin_epoch(0)
    state = stream.state_dict()
    stream.close()
    other = BatchStream(loader(kind, num_workers=now))
    with pytest.raises(DataError, match=f"num_workers={saved}, now it is {now}; expected the same number"):
        other.load_state_dict(state)
    assert compare_fingerprints(stream.fingerprint(), other.fingerprint()) == [
        f"number of workers: {saved} when saved, {now} now"
    ]


@quiet
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shorter_or_other_data_set_is_refused(workers: int) -> None:
    stream = BatchStream(loader(Streamed, num_workers=workers))
    stream.begin_epoch(0)
    for _ in range(3):
        stream.fetch()
    state = stream.state_dict()
    stream.close()
    shorter = BatchStream(DataLoader(Streamed(7), 4, num_workers=workers))
    with pytest.raises(DataError, match="after 3 batches of this worker, but now its epoch has 2"):
        shorter.load_state_dict(state)
    shorter.close()
    with pytest.raises(DataError, match=r"a state for the positions \[2, 3\].*expected one for 1"):
        shorter.load_state_dict({**state, "position": 1})
    with pytest.raises(DataError, match="generator"):
        BatchStream(loader(Streamed, num_workers=workers, generator=torch.Generator())).load_state_dict(state)


def test_a_state_is_not_forced_on_a_data_set_without() -> None:
    stream = BatchStream(loader(Stateful))
    stream.begin_epoch(0)
    stream.fetch()
    with pytest.raises(DataError, match="Streamed has no load_state_dict"):
        BatchStream(loader(Streamed)).load_state_dict(stream.state_dict())


class Deaf(Stateful):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leaves everything as it is."""


def test_a_state_that_does_not_bring_the_data_set_to_its_end_is_refused() -> None:
    stream = BatchStream(loader(Deaf))
    stream.begin_epoch(0)
    rest(stream, 1)
    stream.begin_epoch(1)
    with pytest.raises(DataError, match="state of its end, but Deaf gave another item"):
        BatchStream(loader(Deaf)).load_state_dict(stream.state_dict())


class Failing(Streamed):
    broken = [9]

    def item(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise KeyError("item 9")
        return super().item(index)

    def share(self) -> Any:
        return range(self.length)


@quiet
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_with_its_own_batch_and_leaves_the_stream_before_it(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BatchStream(loader(Failing, num_workers=workers))
    seed_all(2)
    stream.begin_epoch(0)
    seen = [digest(stream.fetch()) for _ in range(2)]
    for _ in range(2):
        assert stream.has_next
        with pytest.raises(KeyError, match="item 9"):
            stream.fetch()
        assert stream.position == 2
    monkeypatch.setattr(Failing, "broken", [])
    seen += rest(stream, 1)[::2]
    seed_all(2)
    whole = passage(BatchStream(loader(Failing, num_workers=workers)), 1)
    assert seen == [digest(made) for *_, made, _ in whole[:-1]]


class GiveWay(BaseException):
    pass


class Slow(IterableDataset):
    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Iterator[int]:
        for index in range(4):
            if index == self.at:
                signal.sigtimedwait([], 0.4)
            yield index


@quiet
@pytest.mark.parametrize("at", [0, 2])
def test_waiting_gives_way_to_a_signal_and_nothing_has_changed(at: int) -> None:
    generator = torch.Generator()
    stream = BatchStream(DataLoader(Slow(at), batch_size=None, num_workers=1, generator=generator))

    def on_alarm(*_: Any) -> None:
        assert stream.waiting
        raise GiveWay

    def go_on() -> Iterator[Any]:
        if stream.epoch is None:
            stream.begin_epoch(0)
        while stream.has_next:
            yield stream.fetch()

    before = signal.signal(signal.SIGALRM, on_alarm)
    main, own = torch.get_rng_state(), generator.get_state()
    seen = []
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(GiveWay):
            seen.extend(go_on())
    finally:
        signal.signal(signal.SIGALRM, before)
    if at == 0:
        assert stream.epoch is None
        assert torch.equal(torch.get_rng_state(), main)
        assert torch.equal(generator.get_state(), own)
    assert stream.state_dict()["position"] == stream.position
    fresh = BatchStream(DataLoader(Slow(-1), batch_size=None, num_workers=1, generator=torch.Generator()))
    fresh.load_state_dict(stream.state_dict())
    position = stream.position
    assert list(go_on()) == list(range(4))[position:]
    stream.close()
    stream = fresh
    assert list(go_on()) == list(range(4))[position:]
    fresh.close()


@pytest.mark.filterwarnings("ignore:training data. loading 1 batches again")
def test_abandoned_epochs_and_close() -> None:
    runs = []
    for _ in range(2):
        seed_all(9)
        stream = BatchStream(loader(Streamed, num_workers=len(runs)))
        stream.begin_epoch(0)
        seen = [digest(stream.fetch()) for _ in range(2)]
        stream.begin_epoch(1)
        seen += [digest(stream.fetch())]
        stream.close()
        assert (stream.has_next, stream.position) == (True, 1)
        with pytest.warns(UserWarning, match="1 batches"):
            seen += rest(stream, 2)[::2]
        runs.append(seen)
    assert len(runs[0]) == len(runs[1]) == 7
    assert runs[0] == runs[1]  # one worker has the streams that this process has


def seeded_by_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert info.id == worker
    info.dataset.rng = np.random.default_rng(info.seed)  # type: ignore[attr-defined]
    info.dataset.worker = worker  # type: ignore[attr-defined]


class ByWorker(Stateful):
    worker = -1

    def item(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        assert info is not None
        assert info.id == self.worker
        return torch.tensor([float(index), self.worker, self.rng.random(), info.seed], dtype=torch.float64)


def test_worker_init_fn_and_worker_info_go_on_with_the_same_numbers() -> None:
    """Also where the first worker process has another worker's part after resuming."""
    resumes(
        lambda: loader(ByWorker, num_workers=2, worker_init_fn=seeded_by_worker, collate_fn=None),
        cuts=slice(1, 4, 2),
        epochs=1,
    )


@pytest.mark.long
def test_spawned_workers() -> None:
    """Without lambdas and local classes, everything that a worker needs can be sent to it."""
    seed_all(5)
    forked = passage(BatchStream(loader(Streamed, num_workers=1)), 1)
    seed_all(5)
    spawned = passage(BatchStream(loader(Streamed, num_workers=1, multiprocessing_context="spawn")), 1)
    assert [digest(made) for *_, made, _ in forked[:-1]] == [digest(made) for *_, made, _ in spawned[:-1]]


class Held(Streamed):
    """Reads from what it was given, once."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_used_up_by_reading_is_not_read_for_a_fingerprint_and_is_warned_of(
    workers: int, tmp_path: Any
) -> None:
    path = tmp_path / "lines"
    path.write_text("1\n2\n")
    with path.open() as file:
        with pytest.warns(UserWarning, match=r"dataset\.source, a TextIOWrapper, is used up"):
            stream = BatchStream(DataLoader(Held(file), 1, num_workers=workers))
        assert stream.fingerprint()["first item"] is None
        stream.begin_epoch(0)
        assert rest(stream, 1)[::2] == [digest(["1\n"]), digest(["2\n"])]
    with pytest.warns(UserWarning, match="used up"):
        BatchStream(DataLoader(Held(map(int, "123"))))
    data = Itself()
    assert BatchStream(DataLoader(data)).fingerprint()["first item"] is None
    assert "at" not in vars(data)


def test_fingerprint_tells_data_sets_apart_and_leaves_them_alone() -> None:
    data = Counting()
    before = data.rng.bit_generator.state
    seed_all(1)
    main = torch.get_rng_state()
    taken = BatchStream(DataLoader(data, 4)).fingerprint()
    assert data.rng.bit_generator.state == before
    assert vars(data).get("rounds") is None
    assert torch.equal(torch.get_rng_state(), main)
    assert compare_fingerprints(taken, BatchStream(DataLoader(Counting(), 4)).fingerprint()) == []
    for key, other in {
        "first item": DataLoader(Counting(LENGTH + 5), 4),
        "data set/type": DataLoader(Streamed(), 4),
        "batch size": DataLoader(Counting(), 5),
        "drop_last": DataLoader(Counting(), 4, drop_last=True),
        "kind": DataLoader(range(4), 4),
    }.items():
        differences = compare_fingerprints(taken, BatchStream(other).fingerprint())
        assert any(line.startswith(f"{key}: ") for line in differences), key
    assert (
        taken["first item"]
        == BatchStream(DataLoader(Counting(), 4, num_workers=1)).fingerprint()["first item"]
    )
    begun = BatchStream(DataLoader(Counting(), 4))
    begun.begin_epoch(0)
    assert begun.fingerprint()["first item"] is None  # a pass is under way


class Entropy(Streamed):
    def item(self, index: int) -> torch.Tensor:
        return torch.tensor(np.random.default_rng().random())


@pytest.mark.parametrize("workers", [0, 1])
def test_warns_of_items_that_differ_with_the_same_seeds(workers: int) -> None:
    stream = BatchStream(DataLoader(Entropy(), 4, num_workers=workers), role="val")
    with pytest.warns(
        UserWarning, match="val data: an item of the data set was not the same when read twice"
    ):
        assert stream.fingerprint()["first item"] is None


class Broken(Streamed):
    def __iter__(self) -> Any:
        raise OSError("gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_cannot_be_read(workers: int) -> None:
    stream = BatchStream(DataLoader(Broken(), 4, num_workers=workers))
    assert stream.fingerprint()["first item"] is None

    def first() -> None:
        stream.begin_epoch(0)
        stream.fetch()

    with pytest.raises(OSError, match="gone"):
        first()
    stream.close()


class Empty(Streamed):
    def share(self) -> Any:
        return ()


def test_an_epoch_without_batches_and_lengths() -> None:
    stream = BatchStream(loader(Empty))
    assert stream.length is None
    assert not stream.has_next
    for epoch in range(2):
        stream.begin_epoch(epoch)
        assert (stream.has_next, stream.epoch) == (False, epoch)
    sized = type("Sized", (Streamed,), {"__len__": lambda self: 3 * self.length})
    stream = BatchStream(loader(sized))
    assert stream.length == 15
    assert len(passage(stream, 1)) == 6  # its length is not relied on


class Pipe(IterDataPipe):
    def __iter__(self) -> Iterator[int]:
        yield 1


def test_what_is_refused_or_not_kept() -> None:
    with pytest.raises(DataError, match="data pipe; expected"):
        BatchStream(DataLoader(Pipe()))
    with pytest.raises(DataError, match="in_order=False"):
        BatchStream(DataLoader(Streamed(), num_workers=1, in_order=False))
    with pytest.warns(UserWarning, match="persistent_workers=True is not kept"):
        BatchStream(DataLoader(Streamed(), num_workers=1, persistent_workers=True))
    data = Streamed()
    data.rng = random.SystemRandom()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"dataset\.rng, a SystemRandom, cannot be seeded"):
        BatchStream(DataLoader(data))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def test_endless_data_and_workers_that_end_with_close() -> None:
    stream = BatchStream(DataLoader(Endless(), 2, num_workers=1))
    stream.begin_epoch(0)
    assert [stream.fetch().tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    worker = stream._source._batches._workers[0]  # type: ignore[attr-defined]
    stream.close()
    assert not worker.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
