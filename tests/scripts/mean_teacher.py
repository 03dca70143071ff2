"""Semi-supervised learning with a mean teacher: a copy of the model that a hook moves after each step."""

import argparse
import copy

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything
from states import Trigger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(22)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images[:960] / 16, dtype=torch.float32), torch.tensor(labels[:960])
labelled = torch.arange(960) % 8 == 0

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
teacher = copy.deepcopy(model).requires_grad_(False)


def forward(model, batch):
    x, y, known = batch
    logits = model(x + 0.1 * torch.randn_like(x))
    with torch.no_grad():
        target = teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
    consistency = F.mse_loss(logits.softmax(1), target)
    supervised = (F.cross_entropy(logits, y, reduction="none") * known).sum() / known.sum().clamp(min=1)
    return supervised + 10 * consistency


trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=3e-3),
    None,
    DataLoader(TensorDataset(images, labels, labelled), batch_size=48, shuffle=True),
    epochs=3,
    forward=forward,
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="mean-teacher",
    root=options.root,
)


@trainer.after(Trigger.STEP)
def move_teacher():
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.05)


trainer.fit(resume="auto")
print(fingerprint(trainer, teacher))
