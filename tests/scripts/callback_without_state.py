"""A user's callback that lowers the rate with the loss, and keeps to itself what it remembers."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class FollowLoss(Callback):
    """Keeps the learning rate in proportion to a running average of the loss."""

    def __init__(self, factor=0.02):
        self.factor = factor
        self.average = None

    def on_batch_end(self, batch, metrics):
        before = metrics["loss"] if self.average is None else self.average
        self.average = 0.9 * before + 0.1 * metrics["loss"]
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.factor * self.average


seed_everything(37)
x, y = load_diabetes(return_X_y=True)
data = TensorDataset(torch.tensor(x * 20, dtype=torch.float32), torch.tensor(y / 100, dtype=torch.float32))
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
trainer = Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.05),
    nn.MSELoss(),
    DataLoader(data, batch_size=16, shuffle=True),
    epochs=3,
    callbacks=[FollowLoss()],
    checkpoint=Checkpointing(every_batches=11),
    track=None,
    name="follow-loss-silent",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
