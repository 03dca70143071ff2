"""Cross-entropy and a pull towards running centres of the classes, which the loss keeps as a plain tensor."""

import argparse

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


class CentreLoss(nn.Module):
    def __init__(self, classes, width, momentum=0.9):
        super().__init__()
        self.centres = torch.zeros(classes, width)
        self.momentum = momentum

    def forward(self, outputs, labels):
        features, logits = outputs
        pull = (features - self.centres[labels]).pow(2).mean()
        for label in labels.unique():
            mean = features[labels == label].mean(0).detach()
            self.centres[label] = self.momentum * self.centres[label] + (1 - self.momentum) * mean
        return F.cross_entropy(logits, labels) + 0.5 * pull


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        features = self.features(x)
        return features, self.head(features)


seed_everything(42)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
model = Classifier()
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=3e-3),
    CentreLoss(classes=10, width=6),
    DataLoader(data, batch_size=40, shuffle=True),
    epochs=3,
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="centre-loss",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
