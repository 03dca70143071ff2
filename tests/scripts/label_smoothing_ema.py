"""Label smoothing, averaged weights that are validated, and early stopping on their loss."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import EMA, Checkpointing, EarlyStopping, GradientStatistics, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(32)
images, labels = load_digits(return_X_y=True)
parts = train_test_split(images / 16, labels, train_size=480, test_size=240, random_state=0)
train_x, val_x, train_y, val_y = (torch.as_tensor(part) for part in parts)

model = nn.Sequential(
    nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Hardswish(), nn.Dropout(0.3), nn.Linear(64, 10)
)
optimizer = torch.optim.RAdam(model.parameters(), lr=2e-2)
average = EMA(decay=0.9, validate=True)
trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(label_smoothing=0.1),
    DataLoader(TensorDataset(train_x.float(), train_y), batch_size=32, shuffle=True),
    DataLoader(TensorDataset(val_x.float(), val_y), batch_size=240),
    epochs=12,
    metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
    scheduler=torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=12, power=2),
    clip_grad_norm=1.0,
    callbacks=[EarlyStopping("val/loss", patience=2), average, GradientStatistics(every_batches=5)],
    checkpoint=Checkpointing(best="val/loss", keep_last=1),
    track=None,
    name="smoothing",
    root=options.root,
)
result = trainer.fit(resume="auto")
result.load_best(model)
print(fingerprint(trainer))
