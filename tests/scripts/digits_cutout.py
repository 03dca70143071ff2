"""The same digits, augmented with NumPy, read by two workers, rare classes drawn more often."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


def random_shift(image):
    return np.roll(image, np.random.randint(-1, 2, size=2), axis=(0, 1))


def cutout(image, size=3):
    row, column = np.random.randint(0, 8 - size, size=2)
    image = image.copy()
    image[row : row + size, column : column + size] = 0
    return image


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Digits(Dataset):
    def __init__(self, transform):
        digits = load_digits()
        self.images, self.targets = digits.images[:480].astype("float32") / 16, digits.target[:480]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.transform(self.images[index])
        return torch.from_numpy(image.copy())[None], int(self.targets[index])


seed_everything(2)
dataset = Digits(Compose(random_shift, cutout))
weights = 1.0 / np.bincount(dataset.targets)[dataset.targets]
sampler = WeightedRandomSampler(weights.tolist(), num_samples=320)
train_loader = DataLoader(dataset, batch_size=32, sampler=sampler, num_workers=2, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 36, 10)
)
trainer = Trainer(
    model,
    torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5),
    nn.CrossEntropyLoss(),
    train_loader,
    epochs=2,
    checkpoint=Checkpointing(every_batches=4),
    track=None,
    name="digits-cutout",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
