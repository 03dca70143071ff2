"""Two losses weighed by uncertainties that are learned: the loss is a module with parameters of its own."""

import argparse

import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class UncertaintyLoss(nn.Module):
    """Kendall, Gal and Cipolla's weighing by homoscedastic uncertainty, and a running scale of the targets."""

    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, outputs, targets):
        value, sign = targets
        if self.training:
            self.scale.lerp_(value.abs().mean(), 0.1)
        losses = torch.stack(
            [
                F.mse_loss(outputs[:, 0], value / self.scale),
                F.binary_cross_entropy_with_logits(outputs[:, 1], sign),
            ]
        )
        return (torch.exp(-self.log_variance) * losses + self.log_variance).sum()


class Pairs(TensorDataset):
    def __getitem__(self, index):
        x, value, sign = super().__getitem__(index)
        return x, (value, sign)


seed_everything(24)
x = torch.randn(640, 8)
value = 3 * x[:, 0] * x[:, 1] + 0.1 * torch.randn(640)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 2))
loss_fn = UncertaintyLoss()
trainer = Trainer(
    model,
    torch.optim.Adam([*model.parameters(), *loss_fn.parameters()], lr=1e-2),
    loss_fn,
    DataLoader(Pairs(x, value, (value > 0).float()), batch_size=32, shuffle=True),
    epochs=3,
    clip_grad_norm=2.0,
    checkpoint=Checkpointing(every_batches=9),
    track=None,
    name="uncertainty",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer, loss_fn))
