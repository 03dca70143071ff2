"""KL annealing: a hook raises the weight of one part of the loss, held in a dict of settings, each epoch."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orchestrator import Checkpointing, Trainer, seed_everything
from states import Trigger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

settings = {"kl_weight": 0.0}


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu)), mu, logvar


def forward(model, x):
    logits, mu, logvar = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean()
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1).mean()
    return reconstruction + settings["kl_weight"] * kl


seed_everything(27)
images = torch.tensor(load_digits().data[:960] / 16, dtype=torch.float32)
model = VAE()
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=2e-3),
    None,
    DataLoader(images, batch_size=48, shuffle=True),
    epochs=3,
    forward=forward,
    checkpoint=Checkpointing(every_batches=9),
    track=None,
    name="annealing",
    root=options.root,
)


@trainer.after(Trigger.BEGIN_EPOCH)
def anneal():
    settings["kl_weight"] = min(1.0, trainer.epoch / 2)


trainer.fit(resume="auto")
print(fingerprint(trainer))
