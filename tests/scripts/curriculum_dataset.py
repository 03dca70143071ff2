"""A curriculum: a hook makes the data set harder at the beginning of each epoch."""

import argparse

import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class NoisySigns(Dataset):
    """Is the sum positive? The higher the difficulty, the more noise is on the numbers."""

    def __init__(self, count=480):
        self.inputs = torch.randn(count, 10)
        self.difficulty = 0.0

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        clean = self.inputs[index]
        return clean + self.difficulty * torch.randn(10), (clean.sum() > 0).float()


class Harder(Callback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, epoch):
        self.dataset.difficulty = 0.3 * epoch


seed_everything(26)
dataset = NoisySigns()
model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1), nn.Flatten(0))
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=5e-3),
    nn.BCEWithLogitsLoss(),
    DataLoader(dataset, batch_size=32, shuffle=True),
    epochs=3,
    callbacks=[Harder(dataset)],
    checkpoint=Checkpointing(every_batches=6),
    track=None,
    name="curriculum",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
