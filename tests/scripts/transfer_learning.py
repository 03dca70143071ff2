"""A backbone that was trained on half of the classes, frozen with its BatchNorm in eval mode, and a new head."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(4)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
old, new = labels < 5, labels >= 5


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.BatchNorm2d(16),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        return self.head(self.backbone(x))


def pretrain(model, steps=20):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = torch.randint(int(old.sum()), (64,))
        loss = nn.functional.cross_entropy(model(images[old][chosen]), labels[old][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


model = Classifier(5)
pretrain(model)

for parameter in model.backbone.parameters():
    parameter.requires_grad = False
model.backbone.eval()  # its running statistics stay what they are
model.head = nn.Sequential(nn.Linear(256, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))

dataset = TensorDataset(images[new], labels[new] - 5)
trainer = Trainer(
    model,
    torch.optim.AdamW(model.head.parameters(), lr=3e-3),
    nn.CrossEntropyLoss(),
    DataLoader(dataset, batch_size=64, shuffle=True),
    DataLoader(dataset, batch_size=256),
    epochs=2,
    track=None,
    name="transfer",
    root=options.root,
)
trainer.fit(resume="auto")
assert not model.backbone.training
print(fingerprint(trainer))
