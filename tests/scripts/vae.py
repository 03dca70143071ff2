"""A variational autoencoder: reparameterisation noise, and a loss of two parts that are logged."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 40)
        self.fc21 = nn.Linear(40, 4)
        self.fc22 = nn.Linear(40, 4)
        self.fc3 = nn.Linear(4, 40)
        self.fc4 = nn.Linear(40, 64)

    def encode(self, x):
        h = F.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def reparameterize(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def forward(model, x):
    reconstruction, mu, logvar = model(x)
    bce = F.binary_cross_entropy(reconstruction, x, reduction="sum") / len(x)
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(x)
    trainer.log("bce", bce)
    trainer.log("kld", kld)
    return bce + kld


seed_everything(7)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = VAE()
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-3),
    None,
    DataLoader(images[:1280], batch_size=64, shuffle=True),
    DataLoader(images[1280:], batch_size=64),
    epochs=3,
    forward=forward,
    validate_every=15,
    checkpoint=Checkpointing(every_batches=13),
    track=None,
    name="vae",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
