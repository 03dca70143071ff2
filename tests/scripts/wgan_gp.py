"""A Wasserstein GAN with a gradient penalty; the critic learns twice for each time the generator does."""

import argparse

import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Phase, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

LATENT, PENALTY = 4, 10.0


class Players(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(LATENT, 24), nn.ReLU(), nn.Linear(24, 2))
        self.critic = nn.Sequential(nn.Linear(2, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))


def gradient_penalty(critic, real, fake):
    share = torch.rand(len(real), 1)
    between = (share * real + (1 - share) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def criticise(players, batch):
    (real,) = batch
    fake = players.generator(torch.randn(len(real), LATENT)).detach()
    distance = players.critic(real).mean() - players.critic(fake).mean()
    trainer.log("distance", distance.detach())
    return -distance + PENALTY * gradient_penalty(players.critic, real, fake)


def generate(players, batch):
    return -players.critic(players.generator(torch.randn(len(batch[0]), LATENT))).mean()


seed_everything(33)
angle = torch.rand(512) * 2 * torch.pi
circle = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(512, 2)
players = Players()
critic_optimizer = torch.optim.Adam(players.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
generator_optimizer = torch.optim.Adam(players.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
trainer = Trainer(
    players,
    [
        Phase("critic-1", critic_optimizer, criticise),
        Phase("critic-2", critic_optimizer, criticise),
        Phase("generator", generator_optimizer, generate),
    ],
    None,
    DataLoader(TensorDataset(circle), batch_size=32, shuffle=True),
    epochs=3,
    checkpoint=Checkpointing(every_batches=6),
    track=None,
    name="wgan",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
