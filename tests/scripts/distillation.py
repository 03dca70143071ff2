"""Knowledge distillation: a teacher in eval mode, outside the model that is trained."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(21)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def train_teacher(steps=40):
    teacher = nn.Sequential(
        nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 10)
    )
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


teacher = train_teacher()
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10))
TEMPERATURE, ALPHA = 3.0, 0.7


def forward(student, batch):
    x, y = batch
    logits = student(x)
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1), F.softmax(teacher(x) / TEMPERATURE, 1), reduction="batchmean"
    )
    hard = F.cross_entropy(logits, y)
    trainer.log("soft", soft.detach())
    trainer.log("hard", hard.detach())
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard, logits, y


trainer = Trainer(
    student,
    torch.optim.Adam(student.parameters(), lr=3e-3, amsgrad=True),
    None,
    DataLoader(TensorDataset(images[:1280], labels[:1280]), batch_size=64, shuffle=True),
    DataLoader(TensorDataset(images[1280:], labels[1280:]), batch_size=256),
    epochs=3,
    forward=forward,
    metrics={"accuracy": lambda logits, y: (logits.argmax(1) == y).float().mean()},
    track=None,
    name="distillation",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer, teacher))
