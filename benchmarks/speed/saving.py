"""What a save of 500 MB costs a training: saves of several kinds, in turn, in one training.

Every so many batches one contender saves, from a hook at the batch's end, as its users do it. `still` is how long the
loop stands still for it; for interlock in two parts, at the end of the batch and before the next update, which waits
for the rest of the copy. `later` is how much longer this batch and the next take than others, so in it is how much the
loop is slowed by what is copied or written beside it. With as many threads as processors, and with one fewer.
With --device cuda every batch ends when the device has done what it was given, and memory that is kept is pinned.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from measuring import Row, arguments, beside, keep_memory, report
from torch import Tensor, nn

from orchestrator import Trainer
from orchestrator.requests import Save
from states.table import Trigger

_WIDTH = 1024
_TURN = 7
"""Batches from one save to the next: two are measured, in three it is written and removed, two are as without."""
_CLEAN = 4
_CONTENDERS = 4
COPY = "one copy into allocated memory"


class Saves:
    """The contenders, when each batch of the training began, and how long it stood still for each save."""

    def __init__(self, trainer: Trainer, root: Path) -> None:
        self._trainer, self._root = trainer, root
        self.began: list[float] = []
        self._still: list[Callable[[], float]] = []
        self._copies = self._copying()
        self._ends: deque[Callable[[], object]] = deque()
        self.contenders: dict[str, Callable[[], Save | None]] = {
            COPY: self._copy,
            "interlock": self._interlock,
            "torch.save": self._torch_save,
            "dcp.async_save": self._dcp,
        }
        # By generators, in which this is not state of the training: interlock looks at what hooks keep for changes.
        begins, ends = _calling(self._before_batch), _calling(self._after_batch)
        trainer.before(Trigger.FETCH)(lambda: next(begins))
        trainer.after(Trigger.END_BATCH)(lambda: next(ends))

    def _before_batch(self) -> None:
        self._synchronize()
        self.began.append(time.perf_counter())

    def _synchronize(self) -> None:
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)

    def _after_batch(self) -> None:
        turn, offset = divmod(len(self.began) - 1, _TURN)
        if offset == 0:
            self._synchronize()
            began = time.perf_counter()
            save = list(self.contenders.values())[turn % len(self.contenders)]()
            took = time.perf_counter() - began
            self._still.append(lambda: took if save is None else save.stall_s or 0.0)
        elif offset == _CLEAN:
            while self._ends:
                self._ends.pop()()

    def _tensors(self) -> list[Tensor]:
        state = self._trainer.optimizers[0].state
        parameters = list(self._trainer.model.parameters())
        return [*parameters, *(state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq"))]

    def _state(self) -> dict[str, object]:
        return {
            "model": self._trainer.model.state_dict(),
            "optimizer": self._trainer.optimizers[0].state_dict(),
        }

    def _copying(self) -> Iterator[None]:
        tensors = self._tensors()
        places = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        while True:
            with torch.no_grad():
                for place, tensor in zip(places, self._tensors(), strict=True):
                    place.copy_(tensor, non_blocking=True)
            self._synchronize()
            yield

    def _copy(self) -> None:
        next(self._copies)

    def _interlock(self) -> Save:
        save = self._trainer.save()
        self._ends.append(lambda: shutil.rmtree(save.wait()))
        return save

    def _torch_save(self) -> None:
        torch.save(self._state(), self._root / "torch.pt")
        self._ends.append((self._root / "torch.pt").unlink)

    def _dcp(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future = dcp.async_save(self._state(), checkpoint_id=self._root / "dcp")
        self._ends += [lambda: shutil.rmtree(self._root / "dcp"), future.result]

    def cost(self) -> dict[str, dict[str, list[float]]]:
        """Milliseconds that each save has cost; the first of each contender, which allocates, is left out."""
        took = [end - begin for begin, end in zip(self.began, self.began[1:], strict=False)]
        found: dict[str, dict[str, list[float]]] = {"still": {}, "later": {}}
        for number, at in enumerate(range(0, len(took) - _TURN + 1, _TURN)):
            name = list(self.contenders)[number % len(self.contenders)]
            if number < len(self.contenders):
                continue
            alone = statistics.mean(took[at + _CLEAN + 1 : at + _TURN])
            found["still"].setdefault(name, []).append(self._still[number]() * 1000)
            found["later"].setdefault(name, []).append((took[at] + took[at + 1] - 2 * alone) * 1000)
        return found


def _calling(function: Callable[[], None]) -> Iterator[None]:
    while True:
        yield function()


def rows(layers: int, samples: int, rounds: int, threads: int, device: str) -> list[Row]:
    """What saves cost a training of `threads` threads."""
    torch.set_num_threads(threads)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers))).to(device)
    batch = torch.randn(samples, _WIDTH, device=device), torch.randn(samples, _WIDTH, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True if device != "cpu" else None)
    data = [batch] * (_TURN * _CONTENDERS * (rounds + 1) + 1)
    options: Any = {"epochs": 1, "checkpoint": None, "log": None, "track": None, "device": device}
    with (
        tempfile.TemporaryDirectory() as root,
        Trainer(model, optimizer, nn.MSELoss(), data, root=root, **options) as trainer,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of what this benchmark keeps, and no checkpoint has
        saves = Saves(trainer, Path(root))
        trainer.fit()
    found = []
    for what, values in saves.cost().items():
        named = {f"{name}, {what}, {threads} threads": costs for name, costs in values.items()}
        found += beside(named, f"{COPY}, {what}, {threads} threads", "ms")
    return found


if __name__ == "__main__":
    parser = arguments(__doc__, megabytes=500, samples=32, rounds=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    keep_memory()
    found = []
    every = torch.get_num_threads()
    for threads in sorted({max(1, every - 1), every} if options.device == "cpu" else {every}, reverse=True):
        layers = max(1, round(options.megabytes / 12.6))
        found += rows(layers, options.samples, options.rounds, threads, options.device)
    report(found, options.json)
    dist.destroy_process_group()
