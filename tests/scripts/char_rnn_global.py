"""A character-level GRU whose hidden state is a global of the script, handed from batch to batch."""

import argparse
import this
from codecs import decode

import torch
from fingerprint import fingerprint
from torch import nn

from orchestrator import Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

STREAMS, LENGTH = 6, 12

seed_everything(13)
text = decode(this.s, "rot13").lower()
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])
columns = codes[: len(codes) // STREAMS * STREAMS].reshape(STREAMS, -1)
batches = [columns[:, i : i + LENGTH + 1] for i in range(0, columns.shape[1] - LENGTH, LENGTH)]


class CharRNN(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.gru = nn.GRU(16, 32, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, vocabulary)

    def forward(self, x, hidden):
        output, hidden = self.gru(self.embed(x), hidden)
        return self.head(output), hidden


model = CharRNN(len(characters))
hidden = torch.zeros(2, STREAMS, 32)


def forward(model, batch):
    global hidden
    logits, hidden = model(batch[:, :-1], hidden)
    hidden = hidden.detach()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=5e-3),
    None,
    batches,
    epochs=3,
    forward=forward,
    clip_grad_norm=5.0,
    checkpoint=Checkpointing(every_batches=5),
    track=None,
    name="char-rnn-global",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
