"""CutMix within forward, with the script's own NumPy generator, as NumPy recommends."""

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

rng = np.random.default_rng(41)


def cutmix(model, batch):
    """A rectangle of each image is taken from its neighbour, and the labels are mixed by area."""
    images, labels = batch
    height, width = rng.integers(1, 6, size=2)
    top, left = rng.integers(0, 8 - height), rng.integers(0, 8 - width)
    mixed = images.clone()
    mixed[:, :, top : top + height, left : left + width] = images.roll(1, 0)[
        :, :, top : top + height, left : left + width
    ]
    share = float(height * width) / 64
    logits = model(mixed)
    return (1 - share) * F.cross_entropy(logits, labels) + share * F.cross_entropy(logits, labels.roll(1, 0))


seed_everything(41)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images[:640] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
)
trainer = Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    None,
    DataLoader(TensorDataset(images, torch.tensor(labels[:640])), batch_size=40, shuffle=True),
    epochs=3,
    forward=cutmix,
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="cutmix",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
