"""A GAN that is told the class: spectral normalisation, labels drawn with NumPy, rates that fall by batch."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, LRScheduling, Phase, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Generator(nn.Module):
    def __init__(self, latent=8):
        super().__init__()
        self.latent = latent
        self.label = nn.Embedding(10, 8)
        self.net = nn.Sequential(nn.Linear(latent + 8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, labels):
        noise = torch.randn(len(labels), self.latent)
        return torch.tanh(self.net(torch.cat([noise, self.label(labels)], 1)))


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(10, 8)
        self.net = nn.Sequential(
            spectral_norm(nn.Linear(72, 48)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(48, 1))
        )

    def forward(self, images, labels):
        return self.net(torch.cat([images, self.label(labels)], 1))


def random_labels(count):
    return torch.from_numpy(np.random.randint(0, 10, count))


def discriminate(players, batch):
    images, labels = batch
    wanted = random_labels(len(images))
    fake = players["generator"](wanted).detach()
    real_loss = torch.relu(1 - players["discriminator"](images, labels)).mean()
    fake_loss = torch.relu(1 + players["discriminator"](fake, wanted)).mean()
    return real_loss + fake_loss


def generate(players, batch):
    wanted = random_labels(len(batch[0]))
    return -players["discriminator"](players["generator"](wanted), wanted).mean()


seed_everything(11)
images, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(images[:960] / 8 - 1, dtype=torch.float32), torch.tensor(labels[:960]))
players = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()})
d_optimizer = torch.optim.Adam(players["discriminator"].parameters(), lr=4e-4, betas=(0.0, 0.9))
g_optimizer = torch.optim.Adam(players["generator"].parameters(), lr=1e-4, betas=(0.0, 0.9))
trainer = Trainer(
    players,
    [Phase("discriminator", d_optimizer, discriminate), Phase("generator", g_optimizer, generate)],
    None,
    DataLoader(dataset, batch_size=48, shuffle=True, drop_last=True),
    max_batches=50,
    callbacks=[
        LRScheduling(torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 - i / 50), every="batch")
        for o in (d_optimizer, g_optimizer)
    ],
    checkpoint=Checkpointing(every_batches=15),
    track=None,
    name="conditional-gan",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
