"""Measuring contenders in turn, in one process: medians, and ratios of runs that stood side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Cost", "Figure", "alternate", "report"]


@dataclass
class Cost:
    """Microseconds a batch: by the clock, of processor time of this process, and of the whole machine's."""

    wall: float = 0.0
    cpu: float = 0.0
    machine: float = 0.0

    @classmethod
    @contextmanager
    def measured(cls, batches: int) -> Iterator[Cost]:
        """The cost of the block."""
        cost = cls()
        wall, cpu = time.perf_counter(), time.process_time()
        yield cost
        cost.wall = (time.perf_counter() - wall) / batches * 1e6
        cost.cpu = (time.process_time() - cpu) / batches * 1e6


@dataclass(frozen=True)
class Figure:
    """One number of several runs: its median, and the least and most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        """The figure of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:9.2f} ({self.least:.2f} to {self.most:.2f})"


def alternate(contenders: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """The costs of each contender, taken in turn, the first of each round another; one round more warms up."""
    names = list(contenders)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cost = contenders[name]()
            if number:
                costs[name].append(cost)
    return costs


def report(costs: Mapping[str, list[Cost]], plain: str) -> None:
    """Print what contenders cost, how much more than `plain`, and how many times as much, round by round."""
    for name, found in costs.items():
        print(name)
        for what in ("wall", "cpu", "machine"):
            ours, base = ([getattr(one, what) for one in some] for some in (found, costs[plain]))
            if max(ours) and name == plain:
                print(f"    {what:8} {Figure.of(ours)} µs a batch")
            elif max(ours):
                more = Figure.of([one - other for one, other in zip(ours, base, strict=True)])
                ratio = Figure.of([one / other for one, other in zip(ours, base, strict=True)])
                print(f"    {what:8} {Figure.of(ours)} µs a batch; {more} more; {ratio} times", flush=True)
