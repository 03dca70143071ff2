"""Fine-tuning from the top: the head first, then one layer more each epoch, with rates of their own."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Unfreeze(Callback):
    """Lets one layer more learn each epoch, and halves the rate of those that learn already."""

    def __init__(self, layers):
        self.layers = layers

    def on_epoch_begin(self, epoch):
        for layer in self.layers[: epoch + 1]:
            layer.requires_grad_(True)
        for group in self.trainer.optimizers[0].param_groups[: epoch + 1]:
            group["lr"] *= 0.5


seed_everything(5)
images, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
layers = [model[4], model[2], model[0]]
model.requires_grad_(False)
optimizer = torch.optim.Adam([{"params": layer.parameters(), "lr": 1e-2} for layer in layers])
trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    DataLoader(dataset, batch_size=32, shuffle=True),
    epochs=3,
    callbacks=[Unfreeze(layers)],
    checkpoint=Checkpointing(every_batches=8),
    track=None,
    name="unfreezing",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
