"""A convolutional network on images of digits, cropped and mirrored at random with torch's generator."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()


class Digits(Dataset):
    """Images of 8 x 8 pixels, padded by one and cropped at a random corner; half of them mirrored."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        padded = F.pad(self.images[index], (1, 1, 1, 1))
        top, left = torch.randint(0, 3, (2,)).tolist()
        image = padded[:, top : top + 8, left : left + 8]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, self.labels[index]


seed_everything(1)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
labels = torch.tensor(labels)
train_loader = DataLoader(Digits(images[:480], labels[:480]), batch_size=32, shuffle=True)
val_loader = DataLoader(TensorDataset(images[480:720], labels[480:720]), batch_size=120)

model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Dropout(0.2),
    nn.Linear(16, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    train_loader,
    val_loader,
    epochs=3,
    metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3),
    checkpoint=Checkpointing(best="val/accuracy"),
    track=None,
    name="digits-cnn",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
