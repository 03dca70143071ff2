"""A graph convolutional network, full batch: the loader is a list with one batch, the whole graph."""

import argparse

import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn import functional as F

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

NODES, CLASSES, FEATURES = 120, 3, 16


def planted_graph():
    """Nodes of one class are linked often, others rarely; the adjacency is normalised as Kipf and Welling do."""
    labels = torch.arange(NODES) % CLASSES
    same = labels[:, None] == labels[None, :]
    linked = torch.rand(NODES, NODES) < torch.where(same, 0.12, 0.02)
    adjacency = (linked | linked.T | torch.eye(NODES, dtype=torch.bool)).float()
    scale = adjacency.sum(1).rsqrt()
    return (scale[:, None] * adjacency * scale[None, :]).to_sparse(), torch.randn(NODES, FEATURES), labels


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.second = nn.Linear(16, CLASSES)

    def forward(self, adjacency, x):
        x = F.relu(torch.sparse.mm(adjacency, self.first(F.dropout(x, 0.5, self.training))))
        return torch.sparse.mm(adjacency, self.second(F.dropout(x, 0.5, self.training)))


def masked(which):
    def forward(model, graph):
        logits = model(graph["adjacency"], graph["features"])[graph[which]]
        targets = graph["labels"][graph[which]]
        return F.cross_entropy(logits, targets), logits, targets

    return forward


seed_everything(35)
adjacency, features, labels = planted_graph()
train = torch.arange(NODES) < 45
graph = {"adjacency": adjacency, "features": features, "labels": labels, "train": train, "test": ~train}
model = GCN()
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4),
    None,
    [graph],
    epochs=40,
    forward=masked("train"),
    metrics={"accuracy": lambda logits, targets: (logits.argmax(1) == targets).float().mean()},
    checkpoint=Checkpointing(every_epochs=9),
    track=None,
    name="gcn",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
