"""Whole trainings over every kind of data: interrupted equals unbroken, bit for bit; other data is refused."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)

import trainings
from orchestrator import Trainer
from orchestrator.data import DataError
from orchestrator.recovery import CheckpointMismatch
from states import State
from tracking.journal import Journal

SAMPLES = 46
TIMES = ("duration", "batch_time")


def drawn() -> list[float]:
    return [random.random(), np.random.randn(), torch.rand(()).item()]


class Augmented(Dataset[Any]):
    """Draws from the global generators, and from those of its own and of its transform."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.data = trainings.data(samples)
        self.rng = np.random.default_rng(3)
        chance = random.Random(5)
        self.transform = lambda x: x * (0.5 + chance.random())

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return self.transform(x) + sum(drawn()) / 9 + self.rng.random() / 9, y


class Collate:
    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __call__(self, items: list[Any]) -> Any:
        inputs = torch.stack([x for x, _ in items])
        noise = torch.randn(inputs.shape, generator=self.generator)
        return inputs + noise / 9 + sum(drawn()) / 9, torch.stack([y for _, y in items])


class Unsized(Sampler[int]):
    """Draws for each index, in any number of them, and keeps count of its epochs."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        for _ in range(40 + 2 * self.epochs):
            yield (torch.randint(SAMPLES, ()).item() + random.randrange(SAMPLES) + self.epochs) % SAMPLES


class Buckets(Sampler[list[int]]):
    """Batches of random lengths."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        while order:
            size = random.randint(4, 9)
            batch, order = order[:size], order[size:]
            if len(batch) > 1:  # BatchNorm wants two
                yield batch


class Streamed(IterableDataset[Any]):
    """Sharded by get_worker_info() and shuffled by a generator of its own; its length is unknown."""

    def __init__(self, samples: int = SAMPLES, seed: int = 5) -> None:
        self.data = trainings.data(samples, seed)
        self.rng = np.random.default_rng(1)

    def share(self) -> Any:
        info = get_worker_info()
        order = self.rng.permutation(len(self.data))
        return [int(i) for i in order[(info.id if info else 0) :: info.num_workers if info else 1]]

    def item(self, index: int) -> Any:
        x, y = self.data[index]
        return x + sum(drawn()) / 9 + self.rng.random() / 9, y

    def __iter__(self) -> Iterator[Any]:
        for index in self.share():
            yield self.item(index)


class Stateful(Streamed):
    def __init__(self, samples: int = SAMPLES, seed: int = 5) -> None:
        super().__init__(samples, seed)
        self.left: list[int] = []
        self.resumed = False

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.left = self.share()
        self.resumed = False
        while self.left:
            yield self.item(self.left.pop())

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left, self.resumed = state["left"], True


class Batches(Streamed):
    """Gives whole batches, as a reader of shards does."""

    def __iter__(self) -> Iterator[Any]:
        share, collate = self.share(), Collate()
        for at in range(0, len(share) - 1, 8):
            yield collate([self.item(index) for index in share[at : at + 8]])


Build = Callable[..., Any]


def mapped(kind: type[DataLoader[Any]] = DataLoader, **options: Any) -> Any:
    return kind(Augmented(), **{"batch_size": 8, "collate_fn": Collate(), **options})


def weighted(**options: Any) -> Any:
    generator = torch.Generator().manual_seed(8)
    sampler = WeightedRandomSampler([1.0 + i for i in range(SAMPLES)], 50, generator=generator)
    return mapped(sampler=sampler, drop_last=True, generator=generator, **options)


def streamed(
    data: type[Streamed] = Streamed, kind: type[DataLoader[Any]] = DataLoader, **options: Any
) -> Any:
    return kind(data(), **{"batch_size": 8, "collate_fn": Collate(), "drop_last": True, **options})


LOADERS: dict[str, Build] = {
    "shuffled": lambda **o: mapped(shuffle=True, **o),
    "weighted": weighted,
    "no length": lambda **o: mapped(sampler=Unsized(), **o),
    "batch sampler": lambda **o: mapped(batch_sampler=Buckets(), batch_size=1, **o),
    "streamed": streamed,
    "stateful": lambda **o: streamed(Stateful, **o),
    "whole batches": lambda **o: DataLoader(Batches(), batch_size=None, **o),
}


def history(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in trainer.history]


def losses(trainer: Trainer) -> list[tuple[int | None, int | None, float | None]]:
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        return [
            (r.epoch, r.batch, r.loss) for r in journal.transitions(scope="train") if r.dest is State.FORWARD
        ]


def exact(
    root: Path, build: Build, cuts: list[State], resumed: dict[str, Any] | None = None, **options: Any
) -> None:
    """Interrupted in each of `cuts` in turn, at least seven transitions on; resumed with `resumed` for the loader."""

    def make(root: Path, **of_loader: Any) -> Trainer:
        given = {key: value() if callable(value) else value for key, value in options.items()}
        # The seed is that of the script; building a loader may draw.
        torch.manual_seed(1)
        return trainings.make(root, train_loader=build(**of_loader), **given)

    whole = make(root / "whole")
    whole.fit()
    changed: dict[str, Any] = {}
    for cut in cuts:
        trainer = make(root / "cut", **changed)
        trainer.start("auto")
        for _ in range(7):
            trainer.advance()
        trainer.advance(until=cut)
        assert trainer.state is cut
        trainer.close()
        changed = resumed or {}
    last = make(root / "cut", **changed)
    last.fit("auto")
    assert last.attempt == len(cuts) + 1
    trainings.assert_equal(trainings.weights(whole), trainings.weights(last))
    assert history(whole) == history(last)
    assert losses(whole) == losses(last)
    assert len(losses(whole)) >= 8


said = pytest.mark.filterwarnings("ignore:training data. .*again")

EVERYWHERE = [
    State.BATCH_START,
    State.EPOCH_END,
    State.STEP,
    State.EPOCH_START,
    State.BACKWARD,
    State.BATCH_END,
]


@said
@pytest.mark.parametrize("name", LOADERS)
def test_interrupted_equals_unbroken(name: str, tmp_path: Path) -> None:
    exact(
        tmp_path,
        LOADERS[name],
        EVERYWHERE if name in ("no length", "streamed", "stateful") else [State.BACKWARD, State.BATCH_END],
    )


# (the first attempt, all later ones); the first three are the quick ones
WORKERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("shuffled", {}, {"num_workers": 2}),
    ("weighted", {"num_workers": 2, "persistent_workers": True}, {"num_workers": 1}),
    ("streamed", {"num_workers": 2}, {"num_workers": 2, "prefetch_factor": 1}),
    ("batch sampler", {"num_workers": 1}, {"num_workers": 4, "persistent_workers": True}),
    ("no length", {"num_workers": 2, "prefetch_factor": 4}, {}),
    ("stateful", {"num_workers": 2}, {"num_workers": 2}),
]


@said
@pytest.mark.parametrize(
    ("name", "first", "then"),
    [*WORKERS[:3], *(pytest.param(*found, marks=pytest.mark.long) for found in WORKERS[3:])],
    ids=[f"{n}-{f}-{t}" for n, f, t in WORKERS],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_with_workers(name: str, first: dict[str, Any], then: dict[str, Any], tmp_path: Path) -> None:
    exact(tmp_path, lambda **o: LOADERS[name](**(o or first)), [State.STEP], then, epochs=2)


@said
@pytest.mark.parametrize("name", ["no length", "streamed", "stateful"])
def test_accumulation_and_max_batches_where_the_length_is_unknown(name: str, tmp_path: Path) -> None:
    """The last window of an epoch is short, which only a look ahead can tell; the last epoch is cut off."""
    exact(
        tmp_path,
        LOADERS[name],
        [State.BACKWARD, State.BATCH_START, State.BATCH_END],
        accumulate=4,
        max_batches=13,
    )


@said
@pytest.mark.parametrize("name", ["streamed", "stateful"])
def test_validation_over_an_iterable_data_set(name: str, tmp_path: Path) -> None:
    exact(
        tmp_path,
        LOADERS[name],
        [State.BATCH_START, State.EPOCH_END],
        val_loader=LOADERS[name],
        validate_every=4,
        epochs=2,
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda kind, **o: mapped(kind, shuffle=True, **o),
        lambda kind, **o: mapped(kind, sampler=RandomSampler(range(SAMPLES), replacement=True), **o),
        lambda kind, **o: streamed(Stateful, kind, **o),
        lambda kind, **o: streamed(Stateful, kind, num_workers=2, **o),
    ],
    ids=["shuffled", "replacement", "iterable", "iterable-2"],
)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_stateful_data_loader(build: Build, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    exact(tmp_path, lambda **o: build(stateful, **o), [State.BACKWARD], epochs=2)
    loaded = stateful(range(9))
    loaded.load_state_dict({"at": 3})
    with pytest.raises(DataError, match="a state was loaded into the training loader; expected it as it was"):
        trainings.make(tmp_path, train_loader=loaded)


# -- other data under the same script ---------------------------------------------------------------


def split(seed: int) -> Any:
    part, _ = random_split(trainings.data(60), [40, 20], torch.Generator().manual_seed(seed))
    return DataLoader(part, batch_size=8)


class Files(Dataset[Any]):
    def __init__(self, names: list[int]) -> None:
        self.names = names
        self.data = trainings.data()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.names[index]]


def files(names: Any) -> Any:
    return DataLoader(Files(list(names)), batch_size=8, shuffle=True)


def swapped(samples: int) -> Any:
    return DataLoader(Subset(trainings.data(), list(range(samples))), batch_size=8)


def by_vocabulary(words: str) -> Any:
    numbers = {word: float(number) for number, word in enumerate(words)}

    def collate(items: list[str]) -> Any:
        return torch.tensor([[numbers[word] for word in item] for item in items]), torch.arange(
            len(items)
        ) % 3

    return DataLoader(["abcdef", "bcdefa", "cdefab"] * 16, batch_size=8, shuffle=True, collate_fn=collate)


def middle(turned: bool) -> Any:
    inputs, targets = trainings.data().tensors
    if turned:
        inputs = torch.cat([inputs[:1], inputs[1:-1].flip(0), inputs[-1:]])
    return DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)


OTHER: list[tuple[Any, Any, str]] = [
    (lambda: by_vocabulary("abcdef"), lambda: by_vocabulary("fabcde"), "data: first and last item, collated"),
    (lambda: middle(False), lambda: middle(True), "data: items spread over the data set: "),
    (
        lambda: list(trainings.loader(shuffle=False)),
        lambda: [(x, y.flip(0) if i == 3 else y) for i, (x, y) in enumerate(trainings.loader(shuffle=False))],
        "data: batches spread over the sequence: ",
    ),
    (lambda: split(1), lambda: split(2), "data set/indices"),
    (lambda: files(range(40)), lambda: files(range(39, -1, -1)), "first item: .*\n .*last item"),
    (lambda: swapped(40), lambda: swapped(44), "length of the data set: 40 when saved, 44 now"),
    (weighted, lambda: weighted(batch_size=4), "batch size: 8 when saved, 4 now"),
    (streamed, lambda: DataLoader(Streamed(seed=6), 8, drop_last=True), "first item"),
    (streamed, lambda: streamed(Stateful), "data set/type"),
    (streamed, lambda: streamed(num_workers=1), "number of workers: 0 when saved, 1 now"),
    (streamed, mapped, "kind: iterable when saved, map now"),
]


@pytest.mark.parametrize(("saved", "now", "message"), OTHER, ids=[message for *_, message in OTHER])
def test_other_data_is_refused(saved: Any, now: Any, message: str, tmp_path: Path) -> None:
    with trainings.make(tmp_path, train_loader=saved()) as trainer:
        trainer.advance(until=State.STEP)
    other = trainings.make(tmp_path, train_loader=now())
    before = trainings.weights(other)
    with pytest.raises(CheckpointMismatch, match=message):
        other.fit(resume="auto")
    trainings.assert_equal(trainings.weights(other), before)
    same = trainings.make(tmp_path, train_loader=saved(), max_batches=1)
    assert same.fit(resume="auto").state is State.DONE
