"""Lookahead, an optimizer of the user's own around Adam, which keeps its slow weights in a list."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Lookahead(torch.optim.Adam):
    """k steps forward, one step back (Zhang et al., arXiv 1907.08610)."""

    def __init__(self, params, lr, k=5, alpha=0.5):
        super().__init__(params, lr=lr)
        self.k, self.alpha, self.count = k, alpha, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group, slow_weights in zip(self.param_groups, self.slow, strict=True):
                for fast, slow in zip(group["params"], slow_weights, strict=True):
                    slow.lerp_(fast, self.alpha)
                    fast.copy_(slow)
        return loss


seed_everything(43)
x, y = load_diabetes(return_X_y=True)
data = TensorDataset(torch.tensor(x * 20, dtype=torch.float32), torch.tensor(y / 100, dtype=torch.float32))
model = nn.Sequential(nn.Linear(10, 24), nn.Softplus(), nn.Linear(24, 1), nn.Flatten(0))
trainer = Trainer(
    model,
    Lookahead(model.parameters(), lr=5e-3),
    nn.SmoothL1Loss(),
    DataLoader(data, batch_size=16, shuffle=True),
    epochs=3,
    checkpoint=Checkpointing(every_batches=9),
    track=None,
    name="lookahead",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
