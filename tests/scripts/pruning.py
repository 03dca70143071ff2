"""Iterative magnitude pruning: more of the weights are masked at the end of each epoch."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Prune(Callback):
    def on_epoch_end(self, epoch, metrics):
        for layer in self.trainer.model:
            if isinstance(layer, nn.Linear):
                prune.l1_unstructured(layer, "weight", amount=0.2)


seed_everything(44)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
trainer = Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    nn.CrossEntropyLoss(),
    DataLoader(data, batch_size=32, shuffle=True),
    epochs=4,
    callbacks=[Prune()],
    checkpoint=Checkpointing(every_batches=6),
    track=None,
    name="pruning",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
