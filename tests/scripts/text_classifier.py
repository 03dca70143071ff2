"""Which module does a line of source come from? A transformer over dict batches, padded as they are collated."""

import argparse
import inspect
import random
import textwrap
import types

import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

PAD, UNKNOWN, LONGEST = 0, 1, 32


class Lines(Dataset):
    def __init__(self, modules):
        self.lines = [
            (line.strip(), label)
            for label, module in enumerate(modules)
            for line in inspect.getsource(module).splitlines()
            if len(line) > 20
        ]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        line, label = self.lines[index]
        return {"ids": torch.tensor([min(ord(c), 127) for c in line[:LONGEST]]), "label": label}


class BucketSampler:
    """Batches of lines of about the same length, in a random order."""

    def __init__(self, dataset, batch_size):
        self.order = sorted(range(len(dataset)), key=lambda i: len(dataset.lines[i][0]))
        self.batch_size = batch_size

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __iter__(self):
        batches = [self.order[i : i + self.batch_size] for i in range(0, len(self.order), self.batch_size)]
        random.shuffle(batches)
        return iter(batches)


def collate(items):
    ids = pad_sequence([item["ids"] for item in items], batch_first=True, padding_value=PAD)
    dropped = torch.rand(ids.shape) < 0.05  # some characters are hidden at random
    ids = ids.masked_fill(dropped & (ids != PAD), UNKNOWN)
    return {"ids": ids, "mask": ids == PAD, "label": torch.tensor([item["label"] for item in items])}


class Classifier(nn.Module):
    def __init__(self, classes, width=24):
        super().__init__()
        self.embed = nn.Embedding(128, width, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids, mask):
        x = self.embed(ids) + self.position[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=mask)
        kept = (~mask).unsqueeze(-1)
        return self.head((x * kept).sum(1) / kept.sum(1))


def forward(model, batch):
    logits = model(batch["ids"], batch["mask"])
    return nn.functional.cross_entropy(logits, batch["label"]), logits, batch["label"]


seed_everything(16)
dataset = Lines([textwrap, random, types])
model = Classifier(classes=3)
trainer = Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=2e-3),
    None,
    DataLoader(dataset, batch_sampler=BucketSampler(dataset, 32), collate_fn=collate),
    epochs=2,
    forward=forward,
    metrics={"accuracy": lambda logits, labels: (logits.argmax(1) == labels).float().mean()},
    accumulate=2,
    accumulate_weighting=lambda batch: len(batch["label"]),
    track=None,
    name="classifier",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
