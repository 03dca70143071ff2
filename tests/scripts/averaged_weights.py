"""Stochastic weight averaging by hand, with torch's AveragedModel and SWALR, BatchNorm set anew at the end."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything
from states import Trigger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(45)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images[:640] / 16, dtype=torch.float32), torch.tensor(labels[:640]))
loader = DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
averaged = AveragedModel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    loader,
    epochs=4,
    scheduler=SWALR(optimizer, swa_lr=0.02, anneal_epochs=2),
    checkpoint=Checkpointing(every_batches=9),
    track=None,
    name="averaged",
    root=options.root,
)


@trainer.after(Trigger.END_EPOCH)
def average():
    if trainer.epoch >= 1:
        averaged.update_parameters(model)


trainer.fit(resume="auto")
update_bn(data.tensors[0].split(64), averaged)
print(fingerprint(trainer, averaged))
