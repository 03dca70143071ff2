"""A bigram model on text that is streamed: an IterableDataset with a shuffle buffer."""

import argparse
import inspect
import random
import string

import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Stream(IterableDataset):
    """Pairs of characters that follow each other, shuffled within a buffer."""

    def __init__(self, text, buffer=100):
        self.text = text
        self.buffer = buffer

    def pairs(self):
        for one, other in zip(self.text, self.text[1:], strict=False):
            yield torch.tensor(min(ord(one), 127)), torch.tensor(min(ord(other), 127))

    def __iter__(self):
        held = []
        for pair in self.pairs():
            held.append(pair)
            if len(held) >= self.buffer:
                index = random.randrange(len(held))
                held[index], held[-1] = held[-1], held[index]
                yield held.pop()
        random.shuffle(held)
        yield from held


seed_everything(31)
model = nn.Sequential(nn.Embedding(128, 16), nn.Dropout(0.1), nn.Linear(16, 128))
trainer = Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    nn.CrossEntropyLoss(),
    DataLoader(Stream(inspect.getsource(string)[:3000]), batch_size=64),
    epochs=2,
    checkpoint=Checkpointing(every_batches=10),
    track=None,
    name="stream",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
