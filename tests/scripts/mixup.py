"""Mixup within forward: the share drawn with NumPy, the partners with torch."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


def mixup(model, batch, alpha=0.4):
    x, y = batch
    if not model.training:
        return F.cross_entropy(model(x), y)
    share = np.random.beta(alpha, alpha)
    partner = torch.randperm(len(x))
    logits = model(share * x + (1 - share) * x[partner])
    trainer.log("share", share)
    return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[partner])


seed_everything(25)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(TensorDataset(images[:960], labels[:960]), batch_size=48, shuffle=True),
    DataLoader(TensorDataset(images[960:], labels[960:]), batch_size=256),
    epochs=3,
    forward=mixup,
    scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7),
    checkpoint=Checkpointing(every_batches=8),
    track=None,
    name="mixup",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
