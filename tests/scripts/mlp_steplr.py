"""A multilayer perceptron in the style of the first MNIST example, with a learning rate that falls in steps."""

import argparse

import torch
from fingerprint import fingerprint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--gamma", type=float, default=0.7)
options = parser.parse_args()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return F.log_softmax(self.fc2(x), dim=1)


seed_everything(1)
images, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
train, test = random_split(dataset, [1500, len(dataset) - 1500])
train_loader = DataLoader(train, batch_size=options.batch_size, shuffle=True)
test_loader = DataLoader(test, batch_size=1000)

model = Net()
optimizer = torch.optim.Adadelta(model.parameters(), lr=options.lr)
trainer = Trainer(
    model,
    optimizer,
    F.nll_loss,
    train_loader,
    {"test": test_loader},
    epochs=options.epochs,
    scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=options.gamma),
    track=None,
    name="mlp",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
