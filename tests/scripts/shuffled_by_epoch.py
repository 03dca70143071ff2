"""Image restoration with a DistributedSampler, set_epoch in a hook, and a schedule of the user's own."""

import argparse
import random

import numpy as np
import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from orchestrator import Checkpointing, LRScheduling, Trainer, seed_everything
from states import Trigger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Holes(Dataset):
    """Images with holes, and what was there; holes with all three generators."""

    def __init__(self):
        self.images = load_digits().images[:480].astype("float32") / 16

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        whole = torch.from_numpy(self.images[index]).clone()
        holed = whole.clone()
        holed[np.random.randint(8), torch.randint(8, ())] = 0
        holed[random.randrange(8)] = 0
        return holed.flatten(), whole.flatten()


def seed_worker(worker):
    """As PyTorch's notes on reproducibility have it."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


class Jagged(torch.optim.lr_scheduler.LRScheduler):
    """Falls each batch, and jumps up again, a little less high each time."""

    def __init__(self, optimizer, period=11):
        self.period, self.peak = period, 1.0
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch and self.last_epoch % self.period == 0:
            self.peak *= 0.8
        factor = self.peak * 0.9 ** (self.last_epoch % self.period)
        return [base * factor for base in self.base_lrs]


seed_everything(46)
dataset = Holes()
sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3)
loader = DataLoader(
    dataset,
    batch_size=32,
    sampler=sampler,
    num_workers=2,
    worker_init_fn=seed_worker,
    generator=torch.Generator().manual_seed(0),
    persistent_workers=True,
)
model = nn.Sequential(nn.Linear(64, 48), nn.Mish(), nn.RMSNorm(48), nn.Linear(48, 64))
optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
trainer = Trainer(
    model,
    optimizer,
    nn.MSELoss(),
    loader,
    epochs=3,
    scheduler=LRScheduling(Jagged(optimizer), every="batch"),
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="holes",
    root=options.root,
)


@trainer.after(Trigger.BEGIN_EPOCH)
def shuffle_differently():
    sampler.set_epoch(trainer.epoch)


trainer.fit(resume="auto")
print(fingerprint(trainer))
