"""A pass over validation data on the processor, one thread: what each batch costs beside a bare loop.

The bare loop adds its losses up and reads the sum once, at the end; the other one reads each, as interlock does, whose
journal has them all. The same network on the same batches, which are in memory, in turns (turns.py), pass after pass.
interlock's pass is that of a training, journaled, and that of `Trainer.evaluate`, which nothing records.

With --loader batches are made of single samples by a DataLoader, as most are.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import torch
from measuring import keep_memory, report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import Batches, network
from turns import Contender, Turns, arguments, measured

from orchestrator import Trainer


def bare(model: nn.Module, batches: Batches, *, reads: bool) -> None:
    loss_fn = nn.CrossEntropyLoss()
    model.eval()
    while True:
        total, read = torch.zeros(()), 0.0
        with torch.no_grad():
            for inputs, targets in batches:
                loss = loss_fn(model(inputs), targets)
                if reads:
                    read += loss.item()
                else:
                    total += loss
        total.item()


def interlock(model: nn.Module, batches: Batches, *, journaled: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), [next(iter(batches))],
            batches if journaled else None, epochs=2**20, log=None, track=None, checkpoint=None, root=root,
        )  # fmt: skip
        if journaled:
            trainer.fit()
        while True:
            trainer.evaluate(batches)


CONTENDERS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "bare loop": partial(bare, reads=False),
    "bare loop that reads each loss": partial(bare, reads=True),
    "interlock, evaluate": partial(interlock, journaled=False),
    "interlock, validation journaled": partial(interlock, journaled=True),
}


def contender(name: str, options: argparse.Namespace) -> Contender:
    """The contender of that name, with a network and batches of its own."""
    model = Turns(network(options.width, convolutions=False))
    different = [
        (torch.randn(options.size, 64), torch.randint(10, (options.size,))) for _ in range(options.batches)
    ]
    batches: Batches = different
    if options.loader:
        samples = TensorDataset(*map(torch.cat, zip(*different, strict=True)))
        batches = DataLoader(samples, batch_size=options.size)
    return Contender(name, model, partial(CONTENDERS[name], model, batches))


if __name__ == "__main__":
    parser = arguments(__doc__, batches=5000, size=32, width=32)
    parser.add_argument("--loader", action="store_true", help="batches come from a DataLoader")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report(measured(lambda: [contender(name, options) for name in CONTENDERS], options), options.json)
