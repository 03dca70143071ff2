"""Seconds to stand at a far batch again, over 3.2 million samples, beside those of beginning the epoch."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, WeightedRandomSampler

from orchestrator.data import BatchStream

SAMPLES = 3_200_320
BATCH_SIZE = 32


class Shuffled(Sampler[list[int]]):
    """A batch sampler of a user's own."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        for start in range(0, SAMPLES, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


def loader(**options: Any) -> DataLoader[Any]:
    if "batch_sampler" not in options:
        options["batch_size"] = BATCH_SIZE
    return DataLoader(range(SAMPLES), **options)  # type: ignore[arg-type]


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle=False": loader,
    "shuffle=True": lambda: loader(shuffle=True),
    "with replacement": lambda: loader(sampler=RandomSampler(range(SAMPLES), replacement=True)),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES)),  # type: ignore[arg-type]
    "custom batch sampler": lambda: loader(batch_sampler=Shuffled()),
}


def seconds(build: Callable[[], DataLoader[Any]], batch: int) -> tuple[float, float]:
    """Of `begin_epoch`, and of `load_state_dict` and the first batch in a new stream."""
    stream = BatchStream(build())
    start = time.perf_counter()
    stream.begin_epoch(0)
    begun = time.perf_counter() - start
    state = stream.state_dict() | {"position": batch}
    again = BatchStream(build())
    start = time.perf_counter()
    again.load_state_dict(state)
    again.fetch()
    return begun, time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'seconds, median of ' + str(options.rounds):24} begin the epoch   stand at batch {options.batch:,}"
    )
    for name, build in LOADERS.items():
        found = [seconds(build, options.batch) for _ in range(options.rounds)]
        begun, stood = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:24} {begun:15.2f} {stood:18.2f}")
