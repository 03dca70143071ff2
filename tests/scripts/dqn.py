"""Deep Q-learning on a corridor: a replay memory that a hook fills, a target network, an epsilon that falls."""

import argparse
import copy
import random
from collections import deque

import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

LENGTH = 6


def one_hot(position):
    return nn.functional.one_hot(torch.tensor(position), LENGTH).float()


class Memory(Dataset):
    """The newest 200 moves; an item is one of them at random."""

    def __init__(self):
        self.moves = deque(maxlen=200)

    def __len__(self):
        return 160

    def __getitem__(self, _):
        position, action, reward, after = random.choice(self.moves)
        return one_hot(position), action, reward, one_hot(after)


class Explorer(Callback):
    """Walks the corridor and remembers; copies the network to the target every ten batches."""

    def __init__(self, memory, network, target):
        self.memory, self.network, self.target = memory, network, target
        self.position, self.epsilon = 0, 1.0
        self.walk(50)

    def walk(self, moves):
        for _ in range(moves):
            with torch.no_grad():
                greedy = int(self.network(one_hot(self.position)).argmax())
            action = random.randrange(2) if random.random() < self.epsilon else greedy
            after = max(0, self.position - 1) if action == 0 else self.position + 1
            reward = float(after == LENGTH - 1)
            self.memory.moves.append((self.position, action, reward, after))
            self.position = 0 if reward else after
            self.epsilon = max(0.1, self.epsilon * 0.99)

    def on_batch_end(self, batch, metrics):
        self.walk(4)
        if self.trainer.batches % 10 == 0:
            self.target.load_state_dict(self.network.state_dict())


seed_everything(30)
network = nn.Sequential(nn.Linear(LENGTH, 16), nn.ReLU(), nn.Linear(16, 2))
target = copy.deepcopy(network)
memory = Memory()
explorer = Explorer(memory, network, target)


def forward(network, batch):
    state, action, reward, after = batch
    with torch.no_grad():
        wanted = reward.float() + 0.9 * target(after).max(1).values * (reward == 0)
    return nn.functional.smooth_l1_loss(network(state).gather(1, action[:, None]).squeeze(1), wanted)


trainer = Trainer(
    network,
    torch.optim.Adam(network.parameters(), lr=5e-3),
    None,
    DataLoader(memory, batch_size=16),
    epochs=4,
    forward=forward,
    callbacks=[explorer],
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="dqn",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer, target))
