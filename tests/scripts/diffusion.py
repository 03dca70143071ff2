"""A toy diffusion model of two moons: timesteps and noise drawn in forward, averaged weights for sampling."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader

from orchestrator import EMA, Checkpointing, LRScheduling, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

STEPS = 50


class Denoiser(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.time = nn.Embedding(STEPS, width)
        self.input = nn.Linear(2, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        betas = torch.linspace(1e-4, 0.2, STEPS)
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0))

    def forward(self, x, t):
        return self.body(self.input(x) + self.time(t))


def forward(model, x):
    t = torch.randint(0, STEPS, (len(x),))
    noise = torch.randn_like(x)
    alpha_bar = model.alpha_bar[t, None]
    noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    return nn.functional.mse_loss(model(noisy, t), noise)


seed_everything(34)
points, _ = make_moons(640, noise=0.05, random_state=0)
points = torch.tensor(points, dtype=torch.float32)
model = Denoiser()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(points, batch_size=32, shuffle=True, drop_last=True),
    DataLoader(points[:128], batch_size=64),
    max_batches=55,
    forward=forward,
    scheduler=LRScheduling(
        torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=10), every="batch"
    ),
    callbacks=[EMA(decay=0.95)],
    checkpoint=Checkpointing(every_batches=11),
    track=None,
    name="diffusion",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
