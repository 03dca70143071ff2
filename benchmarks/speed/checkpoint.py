"""Saving 500 MB of model and AdamW state: how long the loop stands still, and how long until it is durable.

interlock saves by `trainer.save()` between two transitions; what is timed is the call. The limit is one copy of the
same tensors into memory that is there already. Then loading, every hash checked, beside mapping the file and copying.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from measuring import arguments, beside, report
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator import Trainer
from orchestrator.snapshot.storage import read_checkpoint
from states import State

MB = 1e6
COPY = "copy into allocated memory"


class Wide(nn.Module):
    """Parameters, and a forward that does not touch them all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(1024, 1024)) for _ in range(size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum((layer[0] for layer in self.layers), inputs)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def measure(root: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, taken in turn; the first round, which allocates, is left out."""
    model = Wide(size)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(
        model, optimizer, nn.MSELoss(), [(torch.randn(8, 1024), torch.randn(8, 1024))] * 10_000, epochs=1,
        log=None, track=None, root=root, checkpoint=None,
    )  # fmt: skip
    trainer.advance(until=State.BATCH_END)
    tensors = {
        f"{kind}.{at}": tensor
        for at, layer in enumerate(model.layers)
        for kind, tensor in [
            ("p", layer.data),
            *((k, v) for k, v in optimizer.state[layer].items() if k != "step"),
        ]
    }
    staging = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    size_mb = sum(tensor.nbytes for tensor in tensors.values()) / MB
    print(f"{size_mb:.0f} MB in {len(tensors)} tensors")
    raw = b"".join(bytes(t.numpy().data.cast("B")) for t in list(tensors.values())[:1]) * len(tensors)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        if number:
            found.setdefault(name, []).append(value * 1000)

    for number in range(rounds + 1):
        note(COPY, seconds(lambda: [staging[n].copy_(t) for n, t in tensors.items()]))
        began = time.perf_counter()
        save = trainer.save()
        note("interlock, stall", time.perf_counter() - began)
        checkpoint = save.wait()
        note("interlock, until durable", time.perf_counter() - began)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        note("torch.save, stall", seconds(partial(torch.save, state, root / "torch.pt")))
        flush(root / "torch.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            future = dcp.async_save(state, checkpoint_id=root / f"dcp{number}")
            note("dcp.async_save, stall", time.perf_counter() - began)
            future.result()
        with (root / "raw").open("wb") as file:
            began = time.perf_counter()
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            note("raw write and fsync", time.perf_counter() - began)
        if not number:
            save_file(tensors, root / "mapped.safetensors")
        note(
            "map and copy",
            seconds(lambda: [tensors[n].copy_(t) for n, t in load_file(root / "mapped.safetensors").items()]),
        )
        note("interlock, load and check", seconds(partial(read_checkpoint, checkpoint)))
        trainer.advance(until=State.BATCH_END)
    trainer.close()
    return found


if __name__ == "__main__":
    options = arguments(__doc__, megabytes=500, rounds=5).parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), round(options.megabytes / 12.58), options.rounds)
    report(beside(found, COPY, "ms"), options.json)
    dist.destroy_process_group()
