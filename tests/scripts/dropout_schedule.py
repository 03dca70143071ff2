"""Dropout that grows with training: a hook sets an attribute of a module every batch, by how far it has come."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class GrowingDropout(Callback):
    """Multiplies the probability each epoch, up to a half."""

    def __init__(self, module):
        self.module = module

    def on_epoch_end(self, epoch, metrics):
        self.module.p = min(0.5, self.module.p * 2)


seed_everything(28)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
dropout = nn.Dropout(0.1)
model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), dropout, nn.Linear(48, 10))
trainer = Trainer(
    model,
    torch.optim.Adamax(model.parameters(), lr=5e-3),
    nn.CrossEntropyLoss(),
    DataLoader(data, batch_size=32, shuffle=True),
    epochs=4,
    callbacks=[GrowingDropout(dropout)],
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="growing-dropout",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
