"""A siamese network: triplets drawn by the data set with Python's random."""

import argparse
import random

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Triplets(Dataset):
    """An anchor, another image of its class, and one of another class."""

    def __init__(self, count=640):
        digits = load_digits()
        self.images = torch.tensor(digits.data[:count] / 16, dtype=torch.float32)
        self.labels = digits.target[:count].tolist()
        self.by_label = {label: [] for label in range(10)}
        for index, label in enumerate(self.labels):
            self.by_label[label].append(index)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        label = self.labels[index]
        positive = random.choice(self.by_label[label])
        other = random.choice([candidate for candidate in range(10) if candidate != label])
        negative = random.choice(self.by_label[other])
        return self.images[index], self.images[positive], self.images[negative]


def forward(model, batch):
    anchor, positive, negative = (nn.functional.normalize(model(images)) for images in batch)
    trainer.log("apart", (anchor - negative).norm(dim=1).mean().detach())
    return nn.functional.triplet_margin_loss(anchor, positive, negative, margin=0.5)


seed_everything(19)
model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.PReLU(), nn.Linear(48, 8))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(Triplets(), batch_size=32, shuffle=True),
    epochs=3,
    forward=forward,
    scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 2], gamma=0.3),
    track=None,
    name="siamese",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
