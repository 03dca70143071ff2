"""word2vec's skip-gram with negative sampling: sparse embeddings and SparseAdam."""

import argparse
import inspect
import re
import statistics
from collections import Counter

import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

NEGATIVE = 4
words = re.findall(r"[a-z]+", inspect.getsource(statistics).lower())[:2000]
counts = Counter(words)
vocabulary = {word: index for index, (word, _) in enumerate(counts.most_common())}
frequencies = torch.tensor([counts[word] for word in vocabulary], dtype=torch.float) ** 0.75


class Pairs(Dataset):
    """A word and one of its neighbours."""

    def __init__(self, window=2):
        ids = [vocabulary[word] for word in words]
        self.pairs = [
            (ids[i], ids[j])
            for i in range(len(ids))
            for j in range(max(0, i - window), min(len(ids), i + window + 1))
            if i != j
        ]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class SkipGram(nn.Module):
    def __init__(self, size, width=16):
        super().__init__()
        self.centre = nn.Embedding(size, width, sparse=True)
        self.context = nn.Embedding(size, width, sparse=True)


def forward(model, batch):
    centre, context = batch
    negative = torch.multinomial(frequencies, len(centre) * NEGATIVE, replacement=True).view(
        len(centre), NEGATIVE
    )
    c = model.centre(centre)
    positive_score = (c * model.context(context)).sum(1)
    negative_score = torch.bmm(model.context(negative), c.unsqueeze(2)).squeeze(2)
    return -(F.logsigmoid(positive_score) + F.logsigmoid(-negative_score).sum(1)).mean()


seed_everything(17)
model = SkipGram(len(vocabulary))
trainer = Trainer(
    model,
    torch.optim.SparseAdam(list(model.parameters()), lr=1e-2),
    None,
    DataLoader(Pairs(), batch_size=256, shuffle=True),
    epochs=2,
    forward=forward,
    checkpoint=Checkpointing(every_batches=11),
    track=None,
    name="skipgram",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
