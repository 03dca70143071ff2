"""Forecasting a series from windows of its past, with a one-cycle schedule stepped by batch."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from orchestrator import Checkpointing, EarlyStopping, LRScheduling, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

EPOCHS, WINDOW, HORIZON = 4, 24, 4


class Windows(Dataset):
    def __init__(self, series):
        self.series = torch.as_tensor(series, dtype=torch.float32)

    def __len__(self):
        return len(self.series) - WINDOW - HORIZON + 1

    def __getitem__(self, start):
        end = start + WINDOW
        return self.series[start:end, None], self.series[end : end + HORIZON]


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 24, batch_first=True)
        self.head = nn.Linear(24, HORIZON)

    def forward(self, x):
        output, _ = self.lstm(x)
        return self.head(output[:, -1])


seed_everything(15)
time = np.arange(900)
series = np.sin(time / 6) + 0.5 * np.sin(time / 25) + 0.1 * np.random.randn(900)
windows = Windows((series - series.mean()) / series.std())
train, val = Subset(windows, range(640)), Subset(windows, range(660, len(windows)))
train_loader = DataLoader(train, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))

model = Forecaster()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
one_cycle = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=1e-2, epochs=EPOCHS, steps_per_epoch=len(train_loader)
)
trainer = Trainer(
    model,
    optimizer,
    nn.HuberLoss(),
    train_loader,
    DataLoader(val, batch_size=128),
    epochs=EPOCHS,
    metrics={"mae": lambda outputs, targets: (outputs - targets).abs().mean()},
    scheduler=LRScheduling(one_cycle, every="batch"),
    callbacks=[EarlyStopping("val/mae", patience=1)],
    checkpoint=Checkpointing(every_batches=9, best="val/mae", mode="min"),
    track=None,
    name="time-series",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
