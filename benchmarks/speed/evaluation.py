"""A pass over validation data on the processor, one thread: what each batch costs beside a bare loop.

The bare loop adds its losses up and reads the sum once, at the end; the other one reads each, as interlock does, whose
journal has them all. The same network on the same batches, which are in memory. A batch is timed from one forward to
another, some hundred batches later. interlock's pass is that of a training, journaled, and that of
`Trainer.evaluate`, which nothing records.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from functools import partial

import torch
from measuring import Cost, alternate, arguments, compared, report
from torch import nn

from orchestrator import Trainer, seed_everything

WARM = 100
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Stamped(nn.Module):
    """The network; notes the time at the WARMth forward of an evaluation and at the last."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        seed_everything(1)
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.calls, self.batches = 0, batches
        self.cost = Cost()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.calls += 1
            if self.calls == WARM:
                self.began = time.perf_counter(), time.process_time()
            elif self.calls == self.batches:
                ended = time.perf_counter(), time.process_time()
                count = self.batches - WARM
                self.cost = Cost(*((b - a) / count * 1e6 for a, b in zip(self.began, ended, strict=True)))
        return self.layers(inputs)


def bare(model: Stamped, batches: Batches, *, reads: bool) -> None:
    loss_fn, total, read = nn.CrossEntropyLoss(), torch.zeros(()), 0.0
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches:
            loss = loss_fn(model(inputs), targets)
            if reads:
                read += loss.item()
            else:
                total += loss
    total.item()


def interlock(model: Stamped, batches: Batches, *, journaled: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), batches[:1],
            batches if journaled else None, epochs=1, log=None, track=None, checkpoint=None, root=root,
        )  # fmt: skip
        if journaled:
            trainer.fit()
        else:
            trainer.evaluate(batches)


CONTENDERS = {
    "bare loop": partial(bare, reads=False),
    "bare loop that reads each loss": partial(bare, reads=True),
    "interlock, evaluate": partial(interlock, journaled=False),
    "interlock, validation journaled": partial(interlock, journaled=True),
}


def cost(name: str, count: int, size: int) -> Cost:
    """What a batch of `size` samples costs a contender."""
    model = Stamped(count)
    batches = [(torch.randn(size, 64), torch.randint(10, (size,))) for _ in range(count)]
    CONTENDERS[name](model, batches)
    return model.cost


if __name__ == "__main__":
    options = arguments(__doc__, batches=5000, rounds=7, size=32).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = {name: partial(cost, name, options.batches, options.size) for name in CONTENDERS}
    report(compared(alternate(chosen, options.rounds), "bare loop"), options.json)
