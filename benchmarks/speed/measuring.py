"""Measuring contenders in turn, in one process: medians, and ratios of runs that stood side by side."""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = [
    "Cost",
    "Figure",
    "Row",
    "alternate",
    "arguments",
    "beside",
    "compared",
    "installed",
    "keep",
    "keep_memory",
    "measured_by",
    "read",
    "report",
]


@dataclass
class Cost:
    """Microseconds a batch: by the clock, and of processor time of this process."""

    wall: float = 0.0
    cpu: float = 0.0

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
    def of(cls, values: Sequence[float]) -> Figure:
        """The figure of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:9.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True)
class Row:
    """One line of the results: what a contender took, and that many times what it is compared with, run by run."""

    name: str
    figure: Figure
    unit: str
    measure: str = ""
    """What the figure is of, where a contender has several: wall, cpu, machine."""
    more: Figure | None = None
    times: Figure | None = None

    def __str__(self) -> str:
        text = f"{self.figure} {self.unit}"
        if self.more is not None:
            text += f"; {self.more} more"
        return text if self.times is None else f"{text}; {self.times} times"


def keep_memory() -> None:
    """Let glibc give nothing back to the system, and all threads have one heap.

    One of a thread's own is of pieces of 64 MB, which are given back and taken again with each batch where its memory
    happens to lie across two of them.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            allocator.mallopt(parameter, 2**30)
        allocator.mallopt(_ARENA_MAX, 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def installed(module: str, name: str) -> bool:
    """Whether a peer is there to be measured; says so where it is not."""
    found = find_spec(module) is not None
    if not found:
        print(f"{name} is not installed here and left out; `make bench` installs the peers")
    return found


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


def beside(values: Mapping[str, Sequence[float]], plain: str | None, unit: str) -> list[Row]:
    """A row for each name, with the ratios to `plain` in the same rounds, where that was measured."""
    base = values.get(plain) if plain is not None else None
    return [
        Row(
            name,
            Figure.of(found),
            unit,
            times=None
            if base is None or name == plain
            else Figure.of([one / other for one, other in zip(found, base, strict=True)]),
        )
        for name, found in values.items()
    ]


def compared(costs: Mapping[str, list[Cost]], plain: str) -> list[Row]:
    """What contenders cost a batch, how much more than `plain`, and how many times as much."""
    rows: list[Row] = []
    for measure in ("wall", "cpu"):
        values = {name: [getattr(one, measure) for one in found] for name, found in costs.items()}
        for row in beside(values, plain, "µs a batch"):
            more = None
            if row.times is not None:
                pairs = zip(values[row.name], values[plain], strict=True)
                more = Figure.of([one - other for one, other in pairs])
            rows.append(replace(row, measure=measure, more=more))
    return [row for name in costs for row in rows if row.name == name]


def arguments(doc: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser with an option for each of `numbers`, and where the results are to be written besides."""
    parser = argparse.ArgumentParser(description=doc)
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser


def measured_by(script: str, arguments: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """What a script prints, and the rows that it writes, for `read`; none where it had nothing to measure with."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-W", "ignore", script, *arguments, "--json", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.rstrip(), json.loads(file.read_text()) if file.exists() else []


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the rows, those of one contender below its name, and write them to `file` if there is one."""
    width = max(len(row.name) for row in rows)
    named = ""
    for row in rows:
        if not row.measure:
            print(f"{row.name:{width}} {row}")
            continue
        if row.name != named:
            print(row.name)
        named = row.name
        print(f"    {row.measure:8} {row}")
    keep(rows, file)


def keep(rows: Sequence[Row], file: Path | None) -> None:
    """Write the rows to `file` if there is one, for `read`."""
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows]))


def read(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows that `keep` has written."""

    def figure(found: Mapping[str, float] | None) -> Figure | None:
        return None if found is None else Figure(**found)

    return [
        Row(
            **{
                **row,
                "figure": Figure(**row["figure"]),
                "more": figure(row["more"]),
                "times": figure(row["times"]),
            }
        )
        for row in rows
    ]
