"""A generative adversarial network: two players, two optimizers, a fixed noise to look at samples with."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Phase, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

LATENT = 16
bce = nn.BCEWithLogitsLoss()


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(32, 1)
        )


def discriminate(gan, batch):
    (real,) = batch
    with torch.no_grad():
        fake = gan.generator(torch.randn(len(real), LATENT))
    judged_real, judged_fake = gan.discriminator(real), gan.discriminator(fake)
    return bce(judged_real, torch.ones_like(judged_real)) + bce(judged_fake, torch.zeros_like(judged_fake))


def generate(gan, batch):
    judged = gan.discriminator(gan.generator(torch.randn(len(batch[0]), LATENT)))
    return bce(judged, torch.ones_like(judged))


class Samples(Callback):
    """Looks at the same 16 noises each epoch, as tutorials do; a picture would be written here."""

    def __init__(self):
        self.noise = torch.randn(16, LATENT)

    def on_epoch_end(self, epoch, metrics):
        generator = self.trainer.model.generator
        generator.eval()
        with torch.no_grad():
            brightness = generator(self.noise).mean()
        generator.train()
        self.trainer.log("brightness", brightness)


seed_everything(999)
images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
gan = GAN()
settings = {"lr": 2e-4, "betas": (0.5, 0.999)}
phases = [
    Phase("discriminator", torch.optim.Adam(gan.discriminator.parameters(), **settings), discriminate),
    Phase("generator", torch.optim.Adam(gan.generator.parameters(), **settings), generate),
]
trainer = Trainer(
    gan,
    phases,
    None,
    DataLoader(TensorDataset(images[:1024]), batch_size=64, shuffle=True),
    epochs=3,
    callbacks=[Samples()],
    track=None,
    name="gan",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
