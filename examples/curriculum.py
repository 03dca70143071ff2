"""A curriculum by a hook: is the number of ones odd? Learned from short sequences first, longer ones each epoch.

Trained twice, with and without the curriculum: a recurrent network that sees nothing but long sequences does not find
out what the question is. Both are safe to be stopped or killed, and run again.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from orchestrator import Checkpointing, Trainer, seed_everything
from states import Trigger

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--epochs", type=int, default=12)
arguments.add_argument("--length", type=int, default=24, help="of the sequences in the end (default: 24)")
arguments.add_argument("--sequences", type=int, default=4096, help="to learn from (default: 4096)")
options = arguments.parse_args()


class Bits(Dataset):
    """Random sequences of zeros and ones."""

    def __init__(self, count):
        self.bits = torch.randint(2, (count, options.length)).float()

    def __len__(self):
        return len(self.bits)

    def __getitem__(self, index):
        return {"bits": self.bits[index]}


class Parity(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.recurrent = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, bits):
        outputs, _ = self.recurrent(bits.unsqueeze(-1))
        return self.head(outputs[:, -1]).squeeze(-1)


def forward(model, batch):
    odd = batch["bits"].sum(1) % 2
    scores = model(batch["bits"])
    return F.binary_cross_entropy_with_logits(scores, odd), scores, odd


def train(name, curriculum):
    seed_everything(7)
    train, val = Bits(options.sequences), Bits(512)
    model = Parity()
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        None,
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(val, batch_size=512),
        epochs=options.epochs,
        forward=forward,
        metrics={"accuracy": lambda scores, odd: ((scores > 0) == (odd == 1)).float().mean()},
        clip_grad_norm=1.0,
        checkpoint=Checkpointing(every_batches=50),
        config=options,
        name=name,
    )

    if curriculum:
        # The length follows from the epoch, which every checkpoint has, and is applied to each batch as it is fetched:
        # nothing that a resume in the middle of an epoch could miss. It would miss an attribute of the data set that
        # is changed as an epoch begins: that is in no checkpoint, and the hook is not called again.
        @trainer.after(Trigger.FETCH)
        def shorten():
            length = min(2 + trainer.epoch, options.length)
            trainer.data["bits"] = trainer.data["bits"][:, :length]
            trainer.log("length", length)

    return [epoch["val/accuracy"] for epoch in trainer.fit(resume="auto").history]


torch.set_num_threads(1)  # the fastest for a network this small
accuracies = {name: train(name, name == "curriculum") for name in ("curriculum", "no-curriculum")}
print(f"accuracy on sequences of {options.length} that were not learned from, after each epoch:")
for name, values in accuracies.items():
    print(f"{name:15}", *(f"{value:6.1%}" for value in values))
