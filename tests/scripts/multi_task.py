"""Two tasks on one trunk: which digit it is, and how bright; each loss and metric logged by name."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.SiLU(), nn.Dropout(0.1))
        self.digit = nn.Linear(48, 10)
        self.brightness = nn.Linear(48, 1)

    def forward(self, x):
        shared = self.trunk(x)
        return {"digit": self.digit(shared), "brightness": self.brightness(shared).squeeze(1)}


def forward(model, batch):
    x, digit, brightness = batch
    outputs = model(x)
    losses = {
        "loss_digit": F.cross_entropy(outputs["digit"], digit),
        "loss_brightness": F.mse_loss(outputs["brightness"], brightness),
    }
    for name, loss in losses.items():
        trainer.log(name, loss.detach())
    return sum(losses.values()), outputs, {"digit": digit}


class GradientScale(Callback):
    """Logs the ratio of the heads' weights at the end of each epoch."""

    def on_epoch_end(self, epoch, metrics):
        model = self.trainer.model
        self.trainer.log("ratio", model.digit.weight.norm() / model.brightness.weight.norm())


seed_everything(23)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
data = TensorDataset(images, labels, images.mean(1))
model = MultiTask()
optimizer = torch.optim.AdamW(
    [
        {"params": model.trunk.parameters(), "lr": 1e-3},
        {"params": [*model.digit.parameters(), *model.brightness.parameters()], "lr": 5e-3},
    ]
)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(data, batch_size=64, shuffle=True),
    {"all": DataLoader(data, batch_size=600)},
    epochs=2,
    forward=forward,
    metrics={"accuracy": lambda out, target: (out["digit"].argmax(1) == target["digit"]).float().mean()},
    validate_every=20,
    callbacks=[GradientScale()],
    checkpoint=Checkpointing(every_batches=10),
    track=None,
    name="multi-task",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
