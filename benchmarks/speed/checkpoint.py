"""Saving and loading 500 MB of model and AdamW state, beside others and beside what the machine can do.

How long the loop stands still, how long until it is durable, how much memory it takes beyond the state's own, and how
much slower the loop is meanwhile; then loading, every hash checked. interlock saves by `trainer.save()` between two
transitions; what is timed is the call. Contenders take turns, each round in another order, and remove what they wrote.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from measuring import Figure, arguments, beside, keep
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator import Trainer
from orchestrator.snapshot.storage import read_checkpoint
from states import State

MB = 1e6

COPY, STALL, DURABLE = "copy into allocated memory", "interlock, stall", "interlock, until durable"
RAW, MAPPED, HASHED = "raw write and fsync", "map and copy", "SHA-256, all processors"
LOADED = "interlock, load and check"


class Wide(nn.Module):
    """Parameters, and a forward that does not touch them all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(1024, 1024)) for _ in range(size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum((layer[0] for layer in self.layers), inputs)


class Step:
    """One training step of a network as small as one has to be to feel a thread beside it."""

    def __init__(self, width: int) -> None:
        self._net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self._optimizer = torch.optim.SGD(self._net.parameters(), 0.01)
        self._batch = torch.randn(32, 64), torch.randint(0, 10, (32,))

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._net(self._batch[0]), self._batch[1])
        loss.backward()
        self._optimizer.step()
        loss.item()

    def seconds(self, going_on: Callable[[], bool]) -> float:
        """What one takes, on average, for as long as `going_on`."""
        number, began = 0, time.perf_counter()
        while going_on() or not number:
            self()
            number += 1
        return (time.perf_counter() - began) / number


def kilobytes(key: str) -> int:
    """A size from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def most_memory(action: Callable[[], object]) -> float:
    """The most bytes that the process has had in memory during `action` beyond those it had before."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = kilobytes("VmRSS")
    action()
    return (kilobytes("VmHWM") - before) * 1024


class Measurement:
    """Everything that is saved, and what was found of it: seconds by name."""

    def __init__(self, root: Path, size: int) -> None:
        self.root = root
        self.found: dict[str, list[float]] = {}
        self.counts = False
        """Whether it is noted; not in the first round, which allocates."""
        self.model = Wide(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        batch = torch.randn(8, 1024), torch.randn(8, 1024)
        self.trainer = Trainer(
            self.model, self.optimizer, nn.MSELoss(), [batch] * 10_000, epochs=1,
            log=None, track=None, root=root, checkpoint=None,
        )  # fmt: skip
        self.trainer.advance(until=State.BATCH_END)
        state = self.optimizer.state
        self.tensors = {
            f"{kind}.{at}": tensor
            for at, layer in enumerate(self.model.layers)
            for kind, tensor in [("p", layer.data), *((k, v) for k, v in state[layer].items() if k != "step")]
        }
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.allocated = {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}
        self.step = Step(64)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.counts:
            self.found.setdefault(name, []).append(time.perf_counter() - began)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def copied(self) -> None:
        with self.timed(COPY):
            for name, tensor in self.tensors.items():
                self.allocated[name].copy_(tensor)

    def saved(self) -> Path:
        """A checkpoint of another boundary than the last."""
        self.trainer.advance(until=State.BATCH_END)
        with self.timed(DURABLE):
            with self.timed(STALL):
                save = self.trainer.save()
            return save.wait()

    def interlock(self) -> None:
        path = self.saved()
        read_checkpoint(path)  # what is written past the page cache is not there yet; others are
        with self.timed(LOADED):
            found = read_checkpoint(path)
        del found  # to give the memory back takes a while too
        shutil.rmtree(path)

    def torch_save(self) -> None:
        with self.timed("torch.save, stall"):
            torch.save(self.state(), self.root / "torch.pt")
        (self.root / "torch.pt").unlink()

    def dcp(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self.timed("dcp.async_save, until durable"):
                with self.timed("dcp.async_save, stall"):
                    future = dcp.async_save(self.state(), checkpoint_id=self.root / "dcp")
                future.result()
        shutil.rmtree(self.root / "dcp")

    def raw(self) -> None:
        parts = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in self.tensors.values()]
        with self.timed(RAW), (self.root / "raw").open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        (self.root / "raw").unlink()

    def mapped(self) -> None:
        path = self.root / "mapped.safetensors"
        if not path.exists():
            save_file(self.tensors, path)
        with self.timed(MAPPED):
            for name, tensor in load_file(path).items():
                self.tensors[name].copy_(tensor)

    def hashed(self) -> None:
        parts = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in self.tensors.values()]
        with ThreadPoolExecutor(os.cpu_count()) as pool, self.timed(HASHED):
            list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))

    def slowed(self, save: Callable[[], Callable[[], bool]]) -> float:
        """How many times as long steps take while what `save` has begun goes on, which it says.

        As before and after it, as a machine's speed changes within the seconds that it takes.
        """
        before = self.alone()
        meanwhile = self.step.seconds(save())
        return 2 * meanwhile / (before + self.alone())

    def alone(self) -> float:
        """What a step takes with nothing beside it: seconds."""
        until = time.perf_counter() + 0.5
        return self.step.seconds(lambda: time.perf_counter() < until)

    def begin_interlock(self) -> Callable[[], bool]:
        self.trainer.advance(until=State.BATCH_END)
        self.step()
        save = self.trainer.save()
        return lambda: not save.done

    def begin_dcp(self) -> Callable[[], bool]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future = dcp.async_save(self.state(), checkpoint_id=self.root / "dcp")
        return lambda: not future.done()

    def clean(self) -> None:
        """Remove what is left of saves that are over."""
        shutil.rmtree(self.root / "dcp", ignore_errors=True)
        for path in self.root.glob("*/checkpoints/*"):
            shutil.rmtree(path)


def print_memory(measurement: Measurement) -> None:
    for name, action in {
        "interlock": measurement.saved,
        "torch.save": measurement.torch_save,
        "dcp.async_save": measurement.dcp,
    }.items():
        print(
            f"{name + ', the first save, most memory':40} {most_memory(action) / measurement.bytes:5.2f} states"
        )
        measurement.clean()


def print_times(measurement: Measurement, rounds: int) -> None:
    contenders = [
        measurement.copied, measurement.interlock, measurement.torch_save, measurement.dcp,
        measurement.raw, measurement.mapped, measurement.hashed,
    ]  # fmt: skip
    for number in range(rounds + 1):
        measurement.counts = number > 0
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender()
    found = measurement.found
    longer = [max(pair) for pair in zip(found[MAPPED], found[HASHED], strict=True)]
    for name, values in found.items():
        unit, base = "copies", found[COPY]
        if "durable" in name:
            unit, base = "raw writes", found[RAW]
        elif name == LOADED:
            unit, base = "of the longer of the two", longer
        figure = Figure.of([value * 1000 for value in values])
        ratio = Figure.of([value / one for value, one in zip(values, base, strict=True)])
        print(f"{name:30} {figure} ms; {ratio} {unit}", flush=True)


def print_slowing(measurement: Measurement, rounds: int) -> None:
    ways = {"interlock": measurement.begin_interlock, "dcp.async_save": measurement.begin_dcp}
    everything = torch.get_num_threads()
    for threads in sorted({1, everything}):
        torch.set_num_threads(threads)
        slowed: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, begin in ways.items():
                slowed[name].append(measurement.slowed(begin))
                measurement.clean()
        for name, values in slowed.items():
            print(
                f"{name}, steps of {threads} threads while it writes {Figure.of(values)} times as long",
                flush=True,
            )


if __name__ == "__main__":
    options = arguments(__doc__, megabytes=500, rounds=7).parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as root:
        measurement = Measurement(Path(root), round(options.megabytes / 12.58))
        print(f"{measurement.bytes / MB:.0f} MB in {len(measurement.tensors)} tensors")
        print_memory(measurement)
        print_times(measurement, options.rounds)
        print_slowing(measurement, options.rounds)
        measurement.trainer.close()
    in_ms = {name: [value * 1000 for value in values] for name, values in measurement.found.items()}
    keep(beside(in_ms, COPY, "ms"), options.json)
    dist.destroy_process_group()
