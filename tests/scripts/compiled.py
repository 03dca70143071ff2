"""A compiled residual network in bfloat16 autocast, with gradients accumulated by samples."""

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


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1))

    def forward(self, x):
        return x + self.body(x)


seed_everything(40)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 32), Residual(32), Residual(32), nn.Linear(32, 10))
# No C++ compiler is needed for this backend; leave it out where there is one.
compiled = torch.compile(model, backend="aot_eager", dynamic=False)
trainer = Trainer(
    compiled,
    torch.optim.AdamW(compiled.parameters(), lr=3e-3, fused=True),
    nn.CrossEntropyLoss(),
    DataLoader(TensorDataset(images[:500], labels[:500]), batch_size=32, shuffle=True),
    epochs=2,
    accumulate=3,
    accumulate_weighting="samples",
    precision="bf16",
    checkpoint=Checkpointing(every_batches=5),
    track=None,
    name="compiled",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
