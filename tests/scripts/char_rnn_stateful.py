"""A character-level LSTM whose hidden state, an attribute of the module, is carried over batches."""

import argparse
import this
from codecs import decode

import torch
from fingerprint import fingerprint
from torch import nn

from orchestrator import Callback, Checkpointing, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

STREAMS, LENGTH = 8, 10

text = decode(this.s, "rot13")
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])


def contiguous_batches(codes):
    """The text cut into 8 streams that are read in parallel, 10 characters a batch."""
    steps = (len(codes) - 1) // STREAMS
    inputs = codes[: STREAMS * steps].reshape(STREAMS, steps)
    targets = codes[1 : STREAMS * steps + 1].reshape(STREAMS, steps)
    return [
        (inputs[:, i : i + LENGTH], targets[:, i : i + LENGTH]) for i in range(0, steps - LENGTH + 1, LENGTH)
    ]


class CharRNN(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, vocabulary)
        self.hidden = None

    def forward(self, x):
        output, hidden = self.lstm(self.embed(x), self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)  # truncated backpropagation through time
        return self.head(output).transpose(1, 2)


class ForgetEachEpoch(Callback):
    def on_epoch_begin(self, epoch):
        self.trainer.model.hidden = None


seed_everything(12)
model = CharRNN(len(characters))
trainer = Trainer(
    model,
    torch.optim.Adam(model.parameters(), lr=5e-3),
    nn.CrossEntropyLoss(),
    contiguous_batches(codes),
    epochs=3,
    clip_grad_norm=1.0,
    callbacks=[ForgetEachEpoch()],
    checkpoint=Checkpointing(every_batches=4),
    track=None,
    name="char-rnn",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
