"""orchestrator/data*.py: batches addressed by (epoch, index), against plain loaders and against
themselves."""

import functools
import os
import random
import signal
import time
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from orchestrator.data import (
    BatchStream,
    DataError,
    Looks,
    compare_fingerprints,
    first_samples,
    likely_causes,
    to_device,
)
from orchestrator.data.batches import count_samples
from orchestrator.data.fingerprint import digest
from orchestrator.data.generators import find_generators
from orchestrator.data.randomness import SideStream, mixed, put_globals, seed_globals, take_globals

LENGTH = 23


class Plain(Dataset):
    """Items without chance; counts its reads."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return torch.tensor([float(index), index * 0.5]), index


class Augmented(Plain):
    """Items that draw from every generator there is."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__(length)
        self.rng = np.random.default_rng(5)
        self.old = np.random.RandomState(6)
        self.inner = {"python": random.Random(7), "torch": [torch.Generator()]}

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        draws = [
            index,
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(()).item(),
            self.rng.random(),
            self.old.rand(),
            self.inner["python"].random(),
            torch.rand((), generator=self.inner["torch"][0]).item(),
        ]
        return torch.tensor(draws, dtype=torch.float64)


def noisy_collate(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + torch.rand(()) + np.random.randn() + random.random()


class Eager(Sampler):
    """Draws when its iterator is taken, and counts that."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.rounds = 0

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        return iter([(index + self.rounds) % self.length for index in torch.randperm(self.length).tolist()])

    def __len__(self) -> int:
        return self.length


class Lazy(Sampler):
    """Draws from all global generators and from one of its own for each index; does not know its length."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            drawn = torch.rand(()).item() + random.random() + np.random.randn() + self.rng.random()
            yield int(drawn * 1000) % self.length


class LazyBatches(Lazy):
    """Batches of random lengths, in a random number."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(super().__iter__())
        while indices:
            size = random.randint(1, 5)
            torch.rand(1)
            yield indices[:size]
            indices = indices[size:]


def generator(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted(**settings: Any) -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0 + i for i in range(LENGTH)], LENGTH, **settings)


Build = Callable[..., DataLoader]

# Samplers that draw before their first index: the same as a loop written by hand.
BY_HAND: dict[str, Build] = {
    "in order": lambda data, **kw: DataLoader(data, batch_size=4, **kw),
    "shuffle": lambda data, **kw: DataLoader(data, batch_size=4, shuffle=True, **kw),
    "drop_last": lambda data, **kw: DataLoader(data, batch_size=4, shuffle=True, drop_last=True, **kw),
    "no batching": lambda data, **kw: DataLoader(data, batch_size=None, shuffle=True, **kw),
    "eager": lambda data, **kw: DataLoader(data, batch_size=5, sampler=Eager(), **kw),
    "eager, no batching": lambda data, **kw: DataLoader(data, batch_size=None, sampler=Eager(), **kw),
    "weighted": lambda data, **kw: DataLoader(data, batch_size=4, sampler=weighted(), **kw),
    "subset": lambda data, **kw: DataLoader(data, 4, sampler=SubsetRandomSampler(range(3, 20)), **kw),
    "generator": lambda data, **kw: DataLoader(data, 4, shuffle=True, generator=generator(), **kw),
    "sampler's generator": lambda data, **kw: DataLoader(
        data, 4, sampler=weighted(generator=generator()), **kw
    ),
    "replacement": lambda data, **kw: DataLoader(
        data, 4, sampler=RandomSampler(data, replacement=True, num_samples=70, generator=generator()), **kw
    ),
    "distributed": lambda data, **kw: DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1), **kw),
    "batch sampler": lambda data, **kw: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data), 3, False), **kw
    ),
    "list of batches": lambda data, **kw: DataLoader(data, batch_sampler=[[1, 2], [3], [4, 5, 6]], **kw),
}
# Samplers that draw while they are iterated: exact against themselves.
ALL: dict[str, Build] = {
    **BY_HAND,
    "lazy": lambda data, **kw: DataLoader(data, batch_size=4, sampler=Lazy(), **kw),
    "lazy batches": lambda data, **kw: DataLoader(data, batch_sampler=LazyBatches(), **kw),
    "global generator": lambda data, **kw: DataLoader(
        data, 4, sampler=RandomSampler(data, num_samples=60, generator=torch.default_generator), **kw
    ),
}


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def global_states() -> str:
    state = np.random.get_state(legacy=False)
    return digest([torch.get_rng_state(), random.getstate(), repr(state), state["state"].get("key")])


def states(loader: DataLoader) -> str:
    """Every global state, and those of the loader's and its samplers' generators."""
    roots = {"loader": [loader.generator, loader.sampler, loader.batch_sampler]}
    owned = find_generators(roots, outside=[loader.dataset]).seedable.values()
    drawn = [g.get_state() if isinstance(g, torch.Generator) else repr(g.bit_generator.state) for g in owned]
    return digest([global_states(), drawn])


def between() -> str:
    """What a training draws between two batches."""
    return digest([torch.rand(3), random.random(), np.random.randn()])


def by_hand(loader: DataLoader, epochs: int = 2) -> list[str]:
    seen = []
    for epoch in range(epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen += [digest(batch), between()]
        seen.append(states(loader))
    return seen


def by_stream(loader: DataLoader, epochs: int = 2) -> list[str]:
    seen = []
    stream = BatchStream(loader)
    for epoch in range(epochs):
        stream.begin_epoch(epoch)
        while stream.has_next:
            seen += [digest(stream.fetch()), between()]
        seen.append(states(loader))
    stream.close()
    return seen


@pytest.mark.parametrize("name", BY_HAND)
def test_order_and_random_states_are_those_of_a_loop_by_hand(name: str) -> None:
    seed_all(3)
    expected = by_hand(BY_HAND[name](Plain()))
    seed_all(3)
    assert by_stream(BY_HAND[name](Plain())) == expected


@pytest.mark.parametrize("name", ["shuffle", "eager, no batching", "generator"])
def test_order_is_that_of_a_loop_by_hand_with_workers(name: str) -> None:
    seed_all(4)
    expected = by_hand(BY_HAND[name](Plain(), num_workers=2))
    seed_all(4)
    assert by_stream(BY_HAND[name](Plain(), num_workers=2)) == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers() -> None:
    runs = []
    for settings_ in (
        {},
        {"num_workers": 1},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1},
        {"num_workers": 3, "prefetch_factor": 4},
    ):
        seed_all(5)
        runs.append(by_stream(ALL["lazy batches"](Augmented(), collate_fn=noisy_collate, **settings_)))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert len(set(runs[0])) == len(runs[0])


class Spawnable(Augmented):
    """Without a torch.Generator: a plain loader cannot send one to a spawned worker either."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        del self.inner["torch"]

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(
            [index, random.random(), np.random.randn(), torch.rand(()).item(), self.rng.random()]
        )


def test_spawned_workers_give_the_same() -> None:
    seed_all(5)
    expected = by_stream(ALL["shuffle"](Spawnable(8), collate_fn=noisy_collate), epochs=1)
    seed_all(5)
    loader = ALL["shuffle"](
        Spawnable(8), num_workers=1, multiprocessing_context="spawn", collate_fn=noisy_collate
    )
    assert by_stream(loader, epochs=1) == expected


def test_batch_draws_nothing_from_the_main_streams() -> None:
    """A kept normal of NumPy's, Python's and the data set's own generators included."""
    data = Augmented()
    stream = BatchStream(DataLoader(data, batch_size=4))
    stream.begin_epoch(0)
    for kept in (True, False):
        np.random.seed(1)
        np.random.standard_normal(3 if kept else 2)
        assert np.random.get_state()[3] == kept
        before = (
            random.getstate(),
            torch.get_rng_state(),
            np.random.get_state(),
            data.rng.bit_generator.state,
        )
        old = data.old.get_state(), data.inner["python"].getstate(), data.inner["torch"][0].get_state()
        stream.fetch()
        after = (
            random.getstate(),
            torch.get_rng_state(),
            np.random.get_state(),
            data.rng.bit_generator.state,
        )
        assert digest(_plain(before)) == digest(_plain(after))
        now = data.old.get_state(), data.inner["python"].getstate(), data.inner["torch"][0].get_state()
        assert digest(_plain(old)) == digest(_plain(now))


def _plain(states: Any) -> Any:
    return [repr(part) if isinstance(part, dict) else part for part in states]


def interrupted(build: Build, cut: int, seed: int = 6, **resumed: Any) -> None:
    """Run unbroken; then stop after `cut` batches, go on in a new stream, disturbed, and compare all the
    rest."""
    seed_all(seed)
    loader = build(Augmented())
    stream = BatchStream(loader)
    rest: list[str] = []
    state: dict[str, Any] = {}
    main: dict[str, Any] = {}
    fetched = 0
    for epoch in range(2):
        stream.begin_epoch(epoch)
        while True:
            if fetched == cut and not state:
                state = stream.state_dict()
                main = {
                    "torch": torch.get_rng_state(),
                    "python": random.getstate(),
                    "numpy": np.random.get_state(legacy=False),
                }
            if not stream.has_next:
                break
            batch = stream.fetch()
            fetched += 1
            if state:
                rest += [digest(batch), str(stream.has_next), between()]
        if state:
            rest.append(states(loader))
    assert state, "the cut is past the end"

    seed_all(seed + 100)
    loader = build(Augmented(), **resumed)
    stream = BatchStream(loader)
    disturbed = global_states()
    reads = loader.dataset.reads
    stream.load_state_dict(state)
    assert loader.dataset.reads == reads
    assert global_states() == disturbed
    torch.set_rng_state(main["torch"])
    random.setstate(main["python"])
    np.random.set_state(main["numpy"])
    assert stream.position == state["position"]
    seen = []
    for epoch in range(state["epoch"], 2):
        if epoch > state["epoch"]:
            stream.begin_epoch(epoch)
        while stream.has_next:
            batch = stream.fetch()
            seen += [digest(batch), str(stream.has_next), between()]
        seen.append(states(loader))
    stream.close()
    assert seen == rest


@pytest.mark.parametrize("name", ALL)
def test_resumes_at_every_position(name: str) -> None:
    seed_all(6)
    length = sum(1 for _ in _tasks(ALL[name](Augmented())))
    for cut in (*range(length + 1), length + 2):
        interrupted(ALL[name], cut)


def _tasks(loader: DataLoader) -> Iterator[Any]:
    stream = BatchStream(loader)
    stream.begin_epoch(0)
    while stream.has_next:
        yield stream.fetch()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ALL)),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**31),
    collate=st.sampled_from([None, noisy_collate]),
)
def test_resumes_anywhere(name: str, cut: int, seed: int, collate: Any) -> None:
    def build(data: Any, **kw: Any) -> DataLoader:
        return ALL[name](data, collate_fn=collate if "no batching" not in name else None, **kw)

    seed_all(seed)
    interrupted(build, min(cut, sum(1 for _ in _tasks(build(Augmented())))), seed)


@pytest.mark.parametrize("resumed", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_resumes_with_another_number_of_workers(resumed: dict[str, Any]) -> None:
    interrupted(ALL["lazy batches"], 3, **resumed)


def test_order_taken_with_workers_goes_on_without() -> None:
    """A loader with workers takes the iterator of an eager sampler twice: its order keeps that."""
    seed_all(8)
    with_workers = BatchStream(ALL["eager, no batching"](Plain(), num_workers=1))
    with_workers.begin_epoch(0)
    first = with_workers.fetch()
    state = with_workers.state_dict()
    rest = [digest(with_workers.fetch()) for _ in range(4)]
    with_workers.close()
    resumed = BatchStream(ALL["eager, no batching"](Plain()))
    resumed.load_state_dict(state)
    assert [digest(resumed.fetch()) for _ in range(4)] == rest
    assert resumed.position == 5
    assert first[0].shape == (2,)


def test_before_any_epoch() -> None:
    user = generator(1)
    stream = BatchStream(DataLoader(Plain(), batch_size=4, shuffle=True, generator=user))
    assert (stream.epoch, stream.position, stream.has_next) == (None, 0, False)
    with pytest.raises(DataError, match="begin_epoch"):
        stream.fetch()
    state = stream.state_dict()
    user.manual_seed(99)
    stream.load_state_dict(state)
    assert torch.equal(user.get_state(), generator(1).get_state())
    assert not stream.has_next


def test_nothing_is_loaded_ahead_or_while_skipping() -> None:
    data = Plain()
    stream = BatchStream(DataLoader(data, batch_size=4))
    stream.begin_epoch(0)
    assert stream.length == 6
    assert stream.has_next
    assert data.reads == 0
    stream.fetch()
    assert data.reads == 4
    state = stream.state_dict()
    state["position"] = 5
    stream.load_state_dict(state)
    assert data.reads == 4
    assert [sample.item() for sample in stream.fetch()[1]] == [20, 21, 22]
    assert data.reads == 7
    assert not stream.has_next
    with pytest.raises(DataError, match="no batch 6 in epoch 0"):
        stream.fetch()


def test_skips_100_000_batches_quickly() -> None:
    stream = BatchStream(DataLoader(range(3_200_000), batch_size=32, shuffle=True))
    stream.begin_epoch(0)
    state = stream.state_dict() | {"position": 100_000}
    started = time.perf_counter()
    stream.load_state_dict(state)
    assert time.perf_counter() - started < 4
    assert not stream.has_next


def test_saved_position_past_the_end_is_refused() -> None:
    stream = BatchStream(DataLoader(Plain(), batch_size=4))
    stream.begin_epoch(0)
    state = stream.state_dict() | {"position": 7}
    with pytest.raises(DataError, match="after batch 6 of epoch 0, but now the epoch has 6 batches"):
        stream.load_state_dict(state)
    listed = BatchStream([1, 2])
    listed.begin_epoch(0)
    with pytest.raises(DataError, match="now has 2"):
        listed.load_state_dict(listed.state_dict() | {"position": 3})
    with pytest.raises(DataError, match="version 9"):
        listed.load_state_dict(listed.state_dict() | {"version": 9})
    with pytest.raises(DataError, match="generators"):
        BatchStream(DataLoader(Plain(), generator=generator())).load_state_dict(state)


def test_sequence_of_batches_draws_nothing() -> None:
    batches = [torch.ones(2), None, torch.zeros(0)]
    seed_all(1)
    before = torch.get_rng_state()
    stream = BatchStream(batches)
    assert stream.length == 3
    stream.begin_epoch(0)
    assert stream.fetch() is batches[0]
    state = stream.state_dict()
    assert [stream.fetch() for _ in range(2)] == batches[1:]
    other = BatchStream(tuple(batches))
    other.load_state_dict(state)
    assert other.fetch() is None
    assert other.has_next
    other.fetch()
    assert not other.has_next
    assert torch.equal(torch.get_rng_state(), before)


def test_epoch_without_batches() -> None:
    for loader in ([], DataLoader(Plain(3), batch_size=4, drop_last=True)):
        stream = BatchStream(loader)
        stream.begin_epoch(0)
        assert not stream.has_next
        stream.begin_epoch(1)
        assert stream.epoch == 1


class Failing(Plain):
    fail = False

    def __getitem__(self, index: int) -> Any:
        if self.fail and index == 5:
            raise KeyError("item 5")
        return super().__getitem__(index)


def test_failed_fetch_leaves_the_stream_before_the_batch() -> None:
    data = Failing()
    stream = BatchStream(DataLoader(data, batch_size=4, shuffle=True))
    seed_all(2)
    expected = by_stream(DataLoader(Plain(), batch_size=4, shuffle=True), epochs=1)[0:12:2]
    seed_all(2)
    stream.begin_epoch(0)
    data.fail = True
    seen = []

    def go_on() -> None:
        while stream.has_next:
            seen.extend([digest(stream.fetch()), between()])

    with pytest.raises(KeyError):
        go_on()
    position = stream.position
    assert stream.has_next
    data.fail = False
    go_on()
    assert seen[::2] == expected
    assert position < 6


@pytest.mark.parametrize("persistent", [False, True])
def test_abandoned_epoch_and_close_with_workers(persistent: bool) -> None:
    settings_ = {"num_workers": 2, "persistent_workers": persistent, "shuffle": True, "batch_size": 2}
    runs = []
    for workers in (settings_, {"shuffle": True, "batch_size": 2}):
        seed_all(9)
        stream = BatchStream(DataLoader(Augmented(), **workers))
        stream.begin_epoch(0)
        seen = [digest(stream.fetch()) for _ in range(3)]
        stream.begin_epoch(1)
        seen += [digest(stream.fetch()) for _ in range(2)]
        stream.close()
        assert stream.has_next
        assert stream.position == 2
        while stream.has_next:
            seen.append(digest(stream.fetch()))
        stream.close()
        runs.append(seen)
    assert runs[0] == runs[1]


class Where(Plain):
    """Items say which process made them; index 3 signals that process first."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        if info is not None and index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return os.getpid(), info is not None and info.dataset is self


started = torch.zeros(1, dtype=torch.int64).share_memory_()


def count_start(worker_id: int) -> None:
    assert isinstance(get_worker_info().dataset, Where)  # type: ignore[union-attr]
    started.add_(worker_id + 1)


def test_workers_outlive_signals_but_not_close() -> None:
    started.zero_()
    loader = DataLoader(
        Where(), batch_size=2, num_workers=1, persistent_workers=True, worker_init_fn=count_start
    )
    stream = BatchStream(loader)
    pids = set()
    for epoch in range(2):
        stream.begin_epoch(epoch)
        while stream.has_next:
            where, own = stream.fetch()
            pids |= set(where.tolist())
            assert own.all()
            assert not stream.waiting
    (worker,) = pids
    assert worker != os.getpid()
    assert started.item() == 1
    os.kill(worker, 0)
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


class Slow(Plain):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.5 if index == 1 else 0)
        return index


class GiveWay(Exception):
    pass


def test_wait_for_a_worker_gives_way_to_a_signal() -> None:
    stream = BatchStream(DataLoader(Slow(4), batch_size=None, num_workers=1, persistent_workers=True))

    def on_alarm(*_: Any) -> None:
        assert stream.waiting
        raise GiveWay

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        stream.begin_epoch(0)
        assert stream.fetch() == 0
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(GiveWay):
            stream.fetch()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stream.position == 1
    assert [stream.fetch() for _ in range(3)] == [1, 2, 3]
    assert not stream.has_next
    stream.close()


class Stuck(Plain):
    def __getitem__(self, index: int) -> Any:
        if index == 1:
            time.sleep(600)
        return os.getpid()


@pytest.mark.long
def test_hung_worker_is_killed_by_close() -> None:
    stream = BatchStream(DataLoader(Stuck(), batch_size=None, num_workers=1))
    stream.begin_epoch(0)
    worker = stream.fetch()
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_script_that_never_closes_ends_at_once(tmp_path: Any) -> None:
    import subprocess
    import sys

    script = tmp_path / "forgetful.py"
    script.write_text(
        "from torch.utils.data import DataLoader\n"
        "from orchestrator.data import BatchStream\n"
        "stream = BatchStream(DataLoader(range(9), num_workers=1, persistent_workers=True))\n"
        "stream.begin_epoch(0)\n"
        "print(stream.fetch().item(), flush=True)\n"
        "raise SystemExit(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout) == (3, "0\n")


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class OwnWay(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


class Renamed(DataLoader):
    pass


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Plain(), in_order=False), "in_order=False.*expected in_order=True"),
        (OwnWay(Plain()), "OwnWay, which overrides __iter__; expected"),
        (iter([1, 2]), "list_iterator, an iterator, which can be gone through but once; expected"),
        (torch.zeros(3, 2), "Tensor.*expected a torch DataLoader"),
        ({"a": 1}, "dict.*expected a torch DataLoader"),
        (DataLoader(Plain(), sampler=iter([1, 2])), "sampler of the training loader is a list_iterator"),
        (
            DataLoader(Plain(), batch_sampler=(b for b in [[1]])),
            "sampler of the training loader is a generator",
        ),
    ],
)
def test_what_cannot_be_addressed_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        BatchStream(loader)


def test_subclass_that_iterates_as_torch_does_is_accepted() -> None:
    assert len(list(_tasks(Renamed(Plain(), batch_size=4)))) == 6


GLOBAL_RNG = np.random.default_rng(1)


def jitter(value: float) -> float:
    return value + GLOBAL_RNG.random()


class Hidden(Plain):
    shared = random.Random(3)
    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        closed_over = torch.Generator()
        self.slot = np.random.RandomState(1)
        self.transform = lambda value: value + torch.rand((), generator=closed_over).item()
        self.chance = random.SystemRandom()
        self.me = self
        self.many = [("path", 1)] * 10_000

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([jitter(index), self.shared.random(), self.transform(0), self.slot.rand()])


def test_finds_generators_wherever_they_hide() -> None:
    found = find_generators({"dataset": Hidden()})
    assert found.complete
    assert list(found.unseedable) == ["dataset.chance"]
    assert set(found.seedable) == {
        "dataset.slot",
        "dataset.transform.closed_over",
        "dataset.shared",
        f"{__name__}:GLOBAL_RNG",
    }


def test_warns_of_what_cannot_be_seeded_and_seeds_the_rest() -> None:
    with pytest.warns(UserWarning, match=r"dataset\.chance, a SystemRandom, cannot be seeded"):
        stream = BatchStream(DataLoader(Hidden(), batch_size=4))
    stream.begin_epoch(0)
    state = stream.state_dict()
    seen = [digest(stream.fetch()) for _ in range(3)]
    stream.load_state_dict(state)
    assert [digest(stream.fetch()) for _ in range(3)] == seen


class LateGenerator(Plain):
    rng: Any = None

    def __getitem__(self, index: int) -> Any:
        self.rng = self.rng or np.random.default_rng()
        return self.rng.random()


def test_warns_of_a_generator_made_in_getitem() -> None:
    stream = BatchStream(DataLoader(LateGenerator(), batch_size=4))
    stream.begin_epoch(0)
    stream.fetch()
    with pytest.warns(UserWarning, match=r"generator dataset\.rng was made while a batch was made"):
        stream.fetch()
    state = stream.state_dict()
    third = digest(stream.fetch())
    stream.load_state_dict(state)
    assert digest(stream.fetch()) == third


class Entropy(Plain):
    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng().random()


@pytest.mark.parametrize("workers", [0, 1])
def test_warns_of_items_that_differ_with_the_same_seeds(workers: int) -> None:
    stream = BatchStream(DataLoader(Entropy(), batch_size=4, num_workers=workers), role="validation/val")
    with pytest.warns(UserWarning, match="validation/val data: an item of the data set was not the same"):
        print_ = stream.fingerprint()
    assert print_["first item"] is None


def test_every_batch_has_a_stream_of_its_own() -> None:
    stream = BatchStream(DataLoader(Augmented(), batch_sampler=[[1, 2]] * 5))
    seen = []
    for epoch in range(3):
        stream.begin_epoch(epoch)
        while stream.has_next:
            seen.append(stream.fetch())
    for column in range(1, seen[0].shape[1]):
        drawn = torch.cat([batch[:, column] for batch in seen])
        assert len(drawn.unique()) == 30


class CountsByDrawing(LazyBatches):
    def __len__(self) -> int:
        return len(list(iter(self)))


def test_asking_for_the_length_draws_nothing() -> None:
    seed_all(1)
    loader = DataLoader(Plain(), batch_sampler=CountsByDrawing())
    stream = BatchStream(loader)
    before = states(loader)
    length = stream.length
    assert states(loader) == before
    assert length == len(loader.batch_sampler)


def test_fingerprint_tells_data_apart() -> None:
    seed_all(1)
    before = torch.get_rng_state()

    def of(**changed: Any) -> dict[str, Any]:
        whole = {"data": Augmented(), "indices": range(0, 20, 2), "batch_size": 3} | changed
        subset = Subset(whole.pop("data"), list(whole.pop("indices")))
        sampler = whole.pop("sampler", lambda data: RandomSampler(data))(subset)
        return BatchStream(DataLoader(subset, sampler=sampler, **whole)).fingerprint()

    same = of()
    assert compare_fingerprints(same, of()) == []
    assert compare_fingerprints(same, of(num_workers=1)) == []
    assert torch.equal(torch.get_rng_state(), before)
    expected = {
        "data set/indices": of(indices=range(1, 21, 2)),
        "data set/of/length": of(data=Augmented(22)),
        "data set/of/type": of(data=Plain()),
        "batch size": of(batch_size=4),
        "drop_last": of(drop_last=True),
        "first item": of(indices=[7, *range(2, 20, 2)]),
        "last item": of(indices=[*range(0, 18, 2), 7]),
        "length of the data set": of(indices=range(0, 22, 2)),
        "sampler/of/replacement": of(sampler=lambda data: RandomSampler(data, replacement=True)),
        "sampler/of/type": of(sampler=SequentialSampler),
        "number of batches": of(sampler=lambda data: RandomSampler(data, num_samples=40)),
        "first and last item, collated": of(collate_fn=lambda items: -torch.stack(items)),
    }
    for key, other in expected.items():
        assert any(line.startswith(f"{key}: ") for line in compare_fingerprints(same, other)), key
    assert "batch size: 3 when saved, 4 now" in compare_fingerprints(same, expected["batch size"])
    assert {key for key, other in expected.items() if "without a seed" in likely_causes(same, other)} == {
        *("data set/indices", "data set/of/type", "first item", "last item", "length of the data set"),
        "first and last item, collated",
    }
    assert likely_causes(same, of()) == ""


def test_digests_are_those_of_earlier_versions() -> None:
    """Checkpoints are compared by them."""
    assert digest([[1, -2], (3,), []]) == "dd69ad08510b01979b62c9d87dd07bc6"
    assert digest([1, 2.5, "a", True, None]) == "1fdbe34d4647cc09e55bfba8a1be3f61"


def test_fingerprint_of_what_cannot_be_hashed_or_read() -> None:
    class Odd(Plain):
        def __getitem__(self, index: int) -> Any:
            if index:
                raise OSError("gone")
            return object()

    taken = BatchStream(DataLoader(Odd(), batch_sampler=LazyBatches())).fingerprint()
    assert (taken["first item"], taken["last item"], taken["number of batches"]) == (None, None, None)
    listed = BatchStream([torch.ones(2), torch.zeros(2)]).fingerprint()
    assert compare_fingerprints(listed, BatchStream([torch.ones(2)]).fingerprint()) == [
        "number of batches: 2 when saved, 1 now",
        f"last batch: {digest(torch.zeros(2))} when saved, {digest(torch.ones(2))} now",
    ]


def of_items(kind: str, items: list[torch.Tensor]) -> Any:
    inputs = torch.stack(items)
    return {
        "list of batches": lambda: items,
        "list": lambda: DataLoader(items, batch_size=4),
        "TensorDataset": lambda: DataLoader(TensorDataset(inputs, inputs), batch_size=4),
        "Subset": lambda: DataLoader(Subset(TensorDataset(inputs), range(len(items))), batch_size=4),
        "ConcatDataset": lambda: DataLoader(ConcatDataset([TensorDataset(inputs)] * 2), batch_size=4),
        "workers": lambda: DataLoader(TensorDataset(inputs), batch_size=4, num_workers=1),
    }[kind]()


KINDS = ["list of batches", "list", "TensorDataset", "Subset", "ConcatDataset", "workers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 40, 700])
def test_data_in_memory_is_told_from_other_data_with_the_same_ends(kind: str, size: int) -> None:
    items = [torch.full((2,), float(number)) for number in range(size)]
    other = [items[0], *reversed(items[1:-1]), items[-1]] if size > 3 else [items[0], items[0], items[2]]
    saved, same, now = (BatchStream(of_items(kind, each)).fingerprint() for each in (items, items, other))
    assert compare_fingerprints(saved, same) == []
    (line,) = compare_fingerprints(saved, now)
    assert line.split(": ")[0] in ("items spread over the data set", "batches spread over the sequence")
    old = {key: value for key, value in saved.items() if "spread" not in key and "collated" not in key}
    assert compare_fingerprints(old, now) == []


def test_a_large_item_in_the_middle_is_looked_at_in_part() -> None:
    items = [torch.zeros(3, 2**20) for _ in range(3)]
    saved = BatchStream(items).fingerprint()
    items[1] = torch.rand(3, 2**20)
    assert len(compare_fingerprints(saved, BatchStream(items).fingerprint())) == 1


class Longest:
    """Keeps something from batch to batch."""

    def __init__(self) -> None:
        self.longest, self.seen, self.rng = 0.0, [0], np.random.default_rng(3)

    def __call__(self, items: list[Any]) -> Any:
        self.longest = max(self.longest, float(items[-1]))
        self.seen.append(1)
        return torch.stack([torch.as_tensor(item) for item in items]) / self.longest + self.rng.random()

    def method(self, items: list[Any]) -> Any:
        return self(items)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_is_as_it_was_after_its_fingerprint(workers: int) -> None:
    def fails(items: list[Any]) -> Any:
        raise OSError("gone")

    def other_each_time(items: list[Any]) -> Any:
        return np.random.default_rng().random()

    longest = Longest()
    with_rng = (longest, longest.method, functools.partial(longest))
    for collate_fn, known in (*((each, True) for each in with_rng), (fails, False), (other_each_time, False)):
        loader = DataLoader(range(1, 9), batch_size=2, collate_fn=collate_fn, num_workers=workers)  # type: ignore[arg-type]
        before = (states(loader), longest.longest, list(longest.seen), longest.rng.bit_generator.state)
        taken = BatchStream(loader).fingerprint()
        assert (taken["first and last item, collated"] is not None) == known
        after = (states(loader), longest.longest, list(longest.seen), longest.rng.bit_generator.state)
        assert before == after


def test_items_that_are_batches_are_collated_one_by_one() -> None:
    def of(sign: int) -> Any:
        return DataLoader(
            [torch.ones(2), torch.zeros(2)], batch_size=None, collate_fn=lambda item: sign * item
        )

    saved = BatchStream(of(1)).fingerprint()
    assert [
        line.split(": ")[0] for line in compare_fingerprints(saved, BatchStream(of(-1)).fingerprint())
    ] == ["first and last item, collated"]


def test_streams() -> None:
    assert len({mixed(base, index) for base in range(50) for index in range(50)}) == 2500
    seed_all(1)
    kept = np.random.randn()  # the second of the pair stays behind
    main, bits = take_globals(), np.random.MT19937()
    seed_globals(7, bits)
    first = between()
    put_globals(main)
    second = np.random.randn()
    seed_all(1)
    assert [np.random.randn(), np.random.randn()] == [kept, second]
    main = take_globals()
    seed_globals(7, bits)
    assert between() == first
    put_globals(main)


def test_side_stream_goes_on_where_it_was() -> None:
    seed_all(1)
    main = [between() for _ in range(2)]
    together, parts = SideStream(5), SideStream(5)
    with together:
        expected = [between() for _ in range(3)]
    seed_all(1)
    seen, own = [], []
    for step in range(3):
        with parts:
            own.append(between())
        if step < 2:
            seen.append(between())
    assert own == expected
    assert seen == main


def test_streams_with_another_bit_generator() -> None:
    """A user may have installed one whose memory is laid out otherwise."""
    bits = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        np.random.randn()
        main = take_globals()
        seed_globals(1, np.random.MT19937())
        put_globals(main)
        assert np.random.get_state(legacy=False)["has_gauss"] == 1
        interrupted(ALL["eager"], 2)
    finally:
        np.random.set_bit_generator(bits)


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    text: list[str]
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (None, 0),
        (torch.zeros(3, 2), 3),
        (torch.zeros(0, 2), 0),
        (torch.tensor(1.0), 1),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ({"ids": ["a", "b"], "x": torch.zeros(5)}, 5),
        (Pair(x=np.zeros((6, 1)), y=None), 6),
        (Record(["a"], torch.zeros(7)), 7),
        (["a", "b"], 2),
        ([], 0),
        ([("a", "b", "c"), ("d", "e", "f")], 3),
        ({"text": ["a", "b"]}, 2),
        ("text", 1),
        (3.0, 1),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)]), 2),
    ],
)
def test_counts_samples(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


def test_first_samples_are_copies_of_two() -> None:
    x, shared = torch.arange(10.0).reshape(5, 2), torch.ones(3)
    batch = {"x": x, "pair": Pair(torch.arange(5), "text"), "shared": shared, "scale": torch.tensor(2.0)}
    found = first_samples(batch, 5)
    x.zero_()
    assert found["x"].tolist() == [[0, 1], [2, 3]]
    assert found["pair"].x.tolist() == [0, 1]
    assert found["shared"] is shared
    assert found["scale"].item() == 2.0
    assert first_samples([torch.tensor([7.0])], 1)[0].tolist() == [7, 7], (
        "one is not told from no batch at all"
    )


class Movable:
    def to(self, device: torch.device) -> str:
        return f"moved to {device}"


def test_moves_nested_batches() -> None:
    x = torch.ones(2)
    batch = {
        "list": [x, "text", 3],
        "pair": Pair(x, None),
        "ordered": OrderedDict(x=x),
        "record": Record(["a"], x),
        "own": Movable(),
    }
    moved = to_device(batch, torch.device("meta"))
    assert moved["list"][0].device.type == "meta"
    assert moved["list"][1:] == ["text", 3]
    assert type(moved["pair"]) is Pair
    assert moved["pair"].x.device.type == "meta"
    assert type(moved["ordered"]) is OrderedDict
    assert moved["ordered"]["x"].device.type == "meta"
    assert moved["record"].x.device.type == "meta"
    assert moved["record"].text == ["a"]
    assert moved["own"] == "moved to meta"
    assert batch["pair"].x is x
    assert to_device(batch, torch.device("cpu"))["list"][0] is x


@dataclass
class Sample:
    x: Any
    more: Any


class Moves:
    def __init__(self, x: Any) -> None:
        self.x, self.label = x, "a"

    def to(self, device: Any) -> "Moves":
        return self


def nested() -> Any:
    with torch.inference_mode():
        never_counted = torch.ones(1)
    sparse = torch.eye(2).to_sparse()
    return {
        "x": [torch.ones(2), (torch.zeros(2), 3)],
        "more": Sample(torch.ones(3), Moves(torch.ones(4))),
        "else": ["a", None, np.ones(2), never_counted, sparse],
    }


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "in a list": (lambda b: b["x"][0].add_(1), 1),
    "a view in a tuple": (lambda b: b["x"][1][0][1:].zero_(), 1),
    "in a dataclass": (lambda b: b["more"].x.mul_(2), 1),
    "in an object": (lambda b: b["more"].more.x.mul_(2), 1),
    "sparse": (lambda b: b["else"][4].mul_(2), 1),
    "another number": (lambda b: b["x"].__setitem__(1, (b["x"][1][0], 4)), 0),
    "another tensor": (lambda b: b["x"].__setitem__(0, torch.ones(2)), 0),
    "another key": (lambda b: b.update(z=1), 0),
    "one less": (lambda b: b["else"].pop(), 0),
    "twice another": (lambda b: [b.update(x=torch.ones(2)) for _ in range(9)], 0),
    "nothing": (lambda b: b["x"][0] + 1, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_become_of_a_batch_is_seen(name: str) -> None:
    change, written = CHANGES[name]
    batch = nested()
    looks = Looks(batch)
    assert not looks.changed(batch)
    change(batch)
    assert looks.changed(batch) == (name != "nothing")
    assert len(looks.written()) == written
    assert BatchStream([batch]).holds(looks.written()) == (written > 0 and name != "sparse")
    assert not BatchStream([nested()]).holds(looks.written())


def test_no_pinning_without_an_accelerator_is_said() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.warns(UserWarning, match="nothing is pinned"):
        stream = BatchStream(DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2, pin_memory=True))
    stream.begin_epoch(0)
    assert not stream.fetch()[0].is_pinned()


def test_quiet_where_there_is_nothing_to_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = BatchStream(DataLoader(Augmented(), batch_size=4))
        stream.begin_epoch(0)
        while stream.has_next:
            stream.fetch()
        stream.fingerprint()
