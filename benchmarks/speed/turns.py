"""Contenders that are alive all at once and take turns, each between two of the first, which is the plain way.

Each is a thread that calls a network of its own; one works at a time, a turn from one forward to another. It is
compared with the mean of the turns before and after it. So what a machine that is busy with other things does from
one minute to the next, it does to both; what comes before the first turn and after the last is measured elsewhere. A
round has several turns of each, of which medians are taken; medians, least and most are of those of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import measuring
import psutil
import torch
from measuring import Figure, Row, measured_by, read
from torch import nn

__all__ = ["Contender", "Finished", "Turns", "arguments", "measured"]

MEASURES = ("wall", "cpu", "machine")


def arguments(doc: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser with what `alternate` asks for, and an option for each of `numbers`."""
    parser = measuring.arguments(doc, rounds=7, turns=12, **numbers)
    parser.add_argument("--turn", type=float, default=0.3, metavar="SECONDS", help="how long a turn takes")
    parser.add_argument("--processes", type=int, default=1, help="how many measure, one after the other")
    return parser


class Finished(Exception):
    """Everything is measured: a training that would go on for long ends."""


class Turns(nn.Module):
    """A contender's network, whose `forward` goes on only while it is the contender's turn."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.batches, self.until, self.over = 0, 0.0, False
        self.begin, self.end = threading.Semaphore(0), threading.Semaphore(0)
        self.began = self.ended = now()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if time.perf_counter() >= self.until:
            if inputs.is_cuda:
                torch.cuda.synchronize(inputs.device)
            self.ended = now()
            self.end.release()
            self.begin.acquire()
            if self.over:
                raise Finished
            self.batches, self.began = 0, now()
        self.batches += 1
        return self.layers(inputs)


def now() -> tuple[float, float, float]:
    """Seconds: of the clock, of this process's threads, and of all the machine's processors."""
    machine = psutil.cpu_times()
    return time.perf_counter(), time.process_time(), machine.user + machine.nice + machine.system


class Contender:
    """One that takes turns: a thread in which `work` calls its `network` on and on, and the processes it starts."""

    def __init__(self, name: str, network: Turns, work: Callable[[], object]) -> None:
        self.name = name
        self._network, self._work = network, work
        self._failed: BaseException | None = None
        self._processes: set[psutil.Process] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._network.end.acquire()  # its first forward

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            with contextlib.suppress(Finished):
                self._work()
        except BaseException as error:
            self._failed = error
        self._network.end.release()

    def turn(self, seconds: float) -> list[float]:
        """Work so long: what a batch took, in microseconds, by each of the measures."""
        _each(self._processes, psutil.Process.resume)
        before = _processes()
        network = self._network
        network.until = time.perf_counter() + seconds
        network.begin.release()
        network.end.acquire()
        if self._failed is not None:
            raise self._failed
        _each(self._processes, psutil.Process.suspend)
        while new := _processes() - before - self._processes:  # one that stands still starts no other
            self._processes |= new
            _each(self._processes, psutil.Process.suspend)
        return [(b - a) / network.batches * 1e6 for a, b in zip(network.began, network.ended, strict=True)]

    def finish(self) -> None:
        """End; from here on all processes run: one that came between two turns may stand still as another's."""
        _each(_processes(), psutil.Process.resume)
        self._network.over, self._network.until = True, 0.0
        self._network.begin.release()
        self._thread.join()


def _each(processes: set[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            do(process)


def _processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def measured(contenders: Callable[[], Sequence[Contender]], options: argparse.Namespace) -> list[Row]:
    """Make the contenders, of which the first is the bare loop, and measure: rows for each. Asked once, by a script."""
    if options.processes > 1:
        return _in_processes(options.processes)
    ones = contenders()
    rows = _alternate(ones, options)
    for one in ones:
        one.finish()
    return rows


def _alternate(contenders: Sequence[Contender], options: argparse.Namespace) -> list[Row]:
    """A row for each measure of each contender."""
    bare, *others = contenders
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    before = bare.turn(options.turn)
    for number in range(options.rounds + 1):
        turns: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for contender in others * options.turns:
            own, after = contender.turn(options.turn), bare.turn(options.turn)
            for at, measure in enumerate(MEASURES):
                beside = (before[at] + after[at]) / 2
                one = (own[at], own[at] - beside, own[at] / beside)
                turns.setdefault((contender.name, measure), []).append(one)
                turns.setdefault((bare.name, measure), []).append((after[at], 0.0, 1.0))
            before = after
        if number:  # the first warms up
            for key, ones in turns.items():
                cost, more, times = map(statistics.median, zip(*ones, strict=True))
                found.setdefault(key, []).append((cost, more, times))
    rows = []
    for contender in contenders:
        for measure in MEASURES:
            cost, more, times = map(Figure.of, zip(*found[contender.name, measure], strict=True))
            row = Row(contender.name, cost, "µs a batch", measure)
            rows.append(row if contender is bare else replace(row, more=more, times=times))
    return rows


def _in_processes(number: int) -> list[Row]:
    """The rows of so many processes that do what this one was asked for: each figure is of their medians."""
    script = str(sys.modules["__main__"].__file__)  # argv has it as seen from another folder
    arguments = [*sys.argv[1:], "--processes", "1"]
    runs = [read(measured_by(script, arguments)[1]) for _ in range(number)]
    rows = []
    for ones in zip(*runs, strict=True):
        figures = {what: [getattr(one, what) for one in ones] for what in ("figure", "more", "times")}
        of_medians = {
            what: Figure.of([figure.median for figure in found])
            for what, found in figures.items()
            if found[0] is not None
        }
        rows.append(replace(ones[0], **of_medians))
    return rows
