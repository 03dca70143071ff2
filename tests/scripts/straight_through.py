"""Quantisation with stochastic rounding: the module draws from a torch.Generator of its own."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Quantize(nn.Module):
    """Rounds up or down at random to one of 16 levels; the gradient passes straight through."""

    def __init__(self, levels=16, seed=0):
        super().__init__()
        self.levels = levels
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("limit", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.limit.lerp_(x.detach().abs().max(), 0.1)
        scaled = x / self.limit * self.levels
        noise = torch.rand(x.shape, generator=self.generator) if self.training else 0.5
        rounded = (scaled + noise).floor().clamp(-self.levels, self.levels) / self.levels * self.limit
        return x + (rounded - x).detach()


seed_everything(36)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
model = nn.Sequential(nn.Linear(64, 48), Quantize(), nn.ReLU(), nn.Linear(48, 10))
trainer = Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    nn.CrossEntropyLoss(),
    DataLoader(data, batch_size=32, shuffle=True),
    epochs=3,
    checkpoint=Checkpointing(every_batches=9),
    track=None,
    name="quantised",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
