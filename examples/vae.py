"""A variational autoencoder of handwritten digits, with a loss of two parts, and pictures of what it has learned.

At the end of each epoch two images are kept among the run's artifacts: held-out digits beside what comes back of them
(reconstructions/), and digits that never were, decoded from random codes (inventions/). Run it again to go on.
"""

import argparse

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orchestrator import Checkpointing, Trainer, seed_everything
from states import Trigger

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--epochs", type=int, default=40)
arguments.add_argument("--beta", type=float, default=1.0, help="weight of the divergence (default: 1)")
arguments.add_argument("--name", default="vae", help="the run's name (default: vae)")
options = arguments.parse_args()

SIDE, CODE = 8, 8


class VAE(nn.Module):
    """Kingma and Welling, arXiv 1312.6114."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(SIDE**2, 256), nn.ReLU(), nn.Linear(256, 2 * CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, 256), nn.ReLU(), nn.Linear(256, SIDE**2), nn.Sigmoid())

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        codes = mean
        if self.training:  # evaluation, and so the exported model, draws nothing
            codes = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(codes), mean, log_variance


def forward(model, images):
    decoded, mean, log_variance = model(images)
    reconstruction = F.binary_cross_entropy(decoded, images, reduction="sum") / len(images)
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum() / len(images)
    trainer.log("reconstruction", reconstruction)
    trainer.log("divergence", divergence)
    return reconstruction + options.beta * divergence


def keep_image(path, rows, scale=6):
    """Keep digits, of shape (rows, columns, 64), as one grey image among the run's artifacts."""
    digits = F.pad(rows.unflatten(-1, (SIDE, SIDE)), (1, 1, 1, 1), value=0.3)
    pixels = digits.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    image = Image.fromarray((pixels * 255).byte().numpy())
    with trainer.artifact(path) as file:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)


torch.set_num_threads(1)  # the fastest for a network this small
seed_everything(7)
images = torch.as_tensor(load_digits().data / 16).float()
train, val = images[:1500], images[1500:]
random_codes = torch.randn(6 * 16, CODE)

model = VAE()
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=2e-3),
    None,
    DataLoader(train, batch_size=32, shuffle=True),
    DataLoader(val, batch_size=297),
    epochs=options.epochs,
    forward=forward,
    checkpoint=Checkpointing(best="val/loss"),
    config=options,
    name=options.name,
)


@trainer.after(Trigger.END_EPOCH)
@torch.no_grad()
def look():
    originals = val[:32]
    decoded = model.decoder(model.encoder(originals)[:, :CODE])  # of the mean: nothing is drawn here
    pairs = torch.stack([originals[:16], decoded[:16], originals[16:], decoded[16:]])
    keep_image(f"reconstructions/epoch-{trainer.epoch:03}.png", pairs)
    keep_image(f"inventions/epoch-{trainer.epoch:03}.png", model.decoder(random_codes).view(6, 16, SIDE**2))


result = trainer.fit(resume="auto")
first, last = result.history[0], result.history[-1]
for name in ("val/loss", "val/reconstruction", "val/divergence"):
    print(f"{name:20} {first[name]:7.2f} after the first epoch, {last[name]:7.2f} after the last")
print(f"its pictures are in {result.run}/artifacts; MLflow shows them in the artifacts of the run")
