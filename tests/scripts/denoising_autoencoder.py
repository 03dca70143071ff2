"""An autoencoder that learns to remove noise, its rate lowered when the validation loss stands still."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from orchestrator import Checkpointing, LRScheduling, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

seed_everything(6)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)


class Autoencoder(nn.Module):
    def __init__(self, code=12):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, code))
        self.decoder = nn.Sequential(nn.Linear(code, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x))


def forward(model, clean):
    noisy = clean + 0.3 * torch.randn_like(clean) if model.training else clean
    restored = model(noisy)
    return nn.functional.mse_loss(restored, clean), restored, clean


model = Autoencoder()
optimizer = torch.optim.NAdam(model.parameters(), lr=5e-3)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(images[:1200], batch_size=48, shuffle=True),
    DataLoader(images[1200:], batch_size=300),
    epochs=4,
    forward=forward,
    metrics={"psnr": lambda restored, clean: -10 * torch.log10(((restored - clean) ** 2).mean())},
    scheduler=LRScheduling(plateau, monitor="val/loss"),
    checkpoint=Checkpointing(best="val/psnr", mode="max"),
    precision="bf16",
    track=None,
    name="autoencoder",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
