"""Ratings of films by users, from vectors of both: a recommender with weight decay and Adagrad."""

import argparse

import numpy as np
import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

from orchestrator import Checkpointing, EarlyStopping, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

USERS, FILMS = 60, 80


class Ratings(Dataset):
    def __init__(self, count=1600):
        tastes, genres = np.random.randn(USERS, 3), np.random.randn(FILMS, 3)
        self.users = np.random.randint(0, USERS, count)
        self.films = np.random.randint(0, FILMS, count)
        self.ratings = np.clip(3 + (tastes[self.users] * genres[self.films]).sum(1), 1, 5).astype("float32")

    def __len__(self):
        return len(self.ratings)

    def __getitem__(self, index):
        return (self.users[index], self.films[index]), self.ratings[index]


class Factorisation(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.users = nn.Embedding(USERS, width)
        self.films = nn.Embedding(FILMS, width)
        self.user_bias = nn.Embedding(USERS, 1)
        self.film_bias = nn.Embedding(FILMS, 1)
        self.mean = nn.Parameter(torch.tensor(3.0))

    def forward(self, pair):
        user, film = pair
        bias = self.user_bias(user) + self.film_bias(film)
        return (self.users(user) * self.films(film)).sum(1) + bias.squeeze(1) + self.mean


seed_everything(18)
train, val = random_split(Ratings(), [0.8, 0.2])
model = Factorisation()
trainer = Trainer(
    model,
    torch.optim.Adagrad(model.parameters(), lr=0.1, weight_decay=1e-5),
    nn.MSELoss(),
    DataLoader(train, batch_size=64, shuffle=True),
    DataLoader(val, batch_size=320),
    epochs=8,
    metrics={"mae": lambda predicted, ratings: (predicted - ratings).abs().mean()},
    callbacks=[EarlyStopping("val/loss", patience=2)],
    checkpoint=Checkpointing(best="val/loss"),
    track=None,
    name="ratings",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
