"""Harder samples are drawn more often: a sampler whose weights a hook moves with the losses."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Indexed(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index], index


class ImportanceSampler(Sampler):
    def __init__(self, count):
        self.weights = torch.ones(count)

    def __len__(self):
        return len(self.weights)

    def __iter__(self):
        return iter(torch.multinomial(self.weights, len(self.weights), replacement=True).tolist())


seed_everything(38)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640])
sampler = ImportanceSampler(640)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def forward(model, batch):
    x, y, index = batch
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    sampler.weights[index] = losses.detach().clamp(min=0.05)
    return losses.mean()


trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=3e-3),
    None,
    DataLoader(Indexed(images, labels), batch_size=32, sampler=sampler),
    epochs=3,
    forward=forward,
    checkpoint=Checkpointing(every_batches=8),
    track=None,
    name="importance",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
