"""SimCLR in small: two augmented views of each image, made with a NumPy generator that the transform owns."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class TwoViews:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def view(self, image):
        image = np.roll(image, self.rng.integers(-1, 2), axis=self.rng.integers(0, 2))
        image = image * self.rng.uniform(0.7, 1.3) + self.rng.normal(0, 0.1, image.shape)
        return torch.from_numpy(image.astype("float32").ravel())

    def __call__(self, image):
        return self.view(image), self.view(image)


class Digits(Dataset):
    def __init__(self, transform):
        self.images = load_digits().images[:640] / 16
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


def info_nce(model, views, temperature=0.5):
    features = F.normalize(model(torch.cat(views)), dim=1)
    similarity = features @ features.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    count = len(views[0])
    partners = torch.arange(2 * count).roll(count)
    return F.cross_entropy(similarity, partners)


seed_everything(20)
encoder = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU())
model = nn.Sequential(encoder, nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(Digits(TwoViews(3)), batch_size=64, shuffle=True, drop_last=True),
    epochs=3,
    forward=info_nce,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2),
    checkpoint=Checkpointing(every_batches=6),
    track=None,
    name="contrastive",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
