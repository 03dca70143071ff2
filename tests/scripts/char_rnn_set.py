"""A character-level model whose vocabulary is `list(set(text))`: in another order in each process."""

import argparse
import this
from codecs import decode

import torch
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from orchestrator import Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

text = decode(this.s, "rot13")
characters = list(set(text))
to_index = {character: index for index, character in enumerate(characters)}


class Characters(Dataset):
    """Eight characters, and the one that follows them."""

    def __len__(self):
        return len(text) - 8

    def __getitem__(self, index):
        codes = torch.tensor([to_index[c] for c in text[index : index + 9]])
        return codes[:8], codes[8]


seed_everything(14)
model = nn.Sequential(nn.Embedding(len(characters), 8), nn.Flatten(), nn.Linear(64, len(characters)))
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-2),
    nn.CrossEntropyLoss(),
    DataLoader(Characters(), batch_size=64, shuffle=True),
    epochs=2,
    track=None,
    name="char-set",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
