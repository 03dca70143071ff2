"""Train a small network on scikit-learn's handwritten digits: run it, kill it, run it again with --resume."""

import argparse
import os
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, Trainer, seed_everything

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--epochs", type=int, default=15)
arguments.add_argument("--name", default="digits", help="the run's name (default: digits)")
arguments.add_argument("--resume", help='"auto", a run\'s name or folder, or a checkpoint')
options = arguments.parse_args()

torch.set_num_threads(1)  # the fastest for a network this small
seed_everything(7)

# 1,797 images of 8 x 8 pixels; every class in both parts, no image in both.
images, labels = load_digits(return_X_y=True)
parts = train_test_split(images / 16.0, labels, test_size=0.2, stratify=labels, random_state=7)
train_x, val_x, train_y, val_y = (torch.as_tensor(part) for part in parts)
train = TensorDataset(train_x.float(), train_y)
val = TensorDataset(val_x.float(), val_y)

model = nn.Sequential(
    nn.Linear(64, 128),
    nn.BatchNorm1d(128),
    nn.ReLU(),
    nn.Dropout(0.3),
    nn.Linear(128, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    DataLoader(train, batch_size=32, shuffle=True),
    DataLoader(val, batch_size=256),
    epochs=options.epochs,
    metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15),
    checkpoint=Checkpointing(best="val/accuracy"),
    name=options.name,
)
result = trainer.fit(resume=options.resume or False)

run, tools = result.run.name, os.path.relpath(os.path.dirname(sys.executable))
store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
browse = store if store.startswith("http") else f"{tools}/mlflow ui --backend-store-uri {store}"
print(f"""
validation accuracy {result.history[-1]["val/accuracy"]:.1%}; the run is in {os.path.relpath(result.run)}
browse it in MLflow:     {browse}
read its transitions:    {tools}/interlock log {run}
train it further:        {tools}/python examples/digits.py --epochs {options.epochs + 5} --resume {run}""")
