"""REINFORCE on a contextual bandit: actions sampled in forward, contexts made on the fly, a running baseline."""

import argparse

import torch
from fingerprint import fingerprint
from torch import nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, Dataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

ARMS = 4


class Contexts(Dataset):
    """A new context each time one is asked for."""

    def __len__(self):
        return 600

    def __getitem__(self, _):
        return torch.randn(6)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, ARMS))
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, context):
        return Categorical(logits=self.net(context))


def pull(context, action):
    best = context[:, :ARMS].argmax(1)
    return (action == best).float() + 0.1 * torch.randn(len(action))


def forward(policy, context):
    choice = policy(context)
    action = choice.sample()
    reward = pull(context, action)
    advantage = reward - policy.baseline
    policy.baseline.lerp_(reward.mean(), 0.05)
    trainer.log("reward", reward.mean())
    return -(choice.log_prob(action) * advantage).mean() - 0.01 * choice.entropy().mean()


seed_everything(29)
policy = Policy()
trainer = Trainer(
    policy,
    torch.optim.Adam(policy.parameters(), lr=1e-2),
    None,
    DataLoader(Contexts(), batch_size=20),
    epochs=3,
    forward=forward,
    checkpoint=Checkpointing(every_batches=16),
    track=None,
    name="reinforce",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
