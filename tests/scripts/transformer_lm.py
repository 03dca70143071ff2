"""A small decoder-only language model: tied embeddings, accumulation, clipping, warmup and then cosine."""

import argparse
import inspect
import json.decoder

import torch
from fingerprint import fingerprint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from orchestrator import Checkpointing, LRScheduling, Trainer, seed_everything

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", default="runs")
options = parser.parse_args()

BLOCK, UPDATES, WARMUP = 32, 20, 5
seed_everything(1337)
text = inspect.getsource(json.decoder)
vocabulary = sorted(set(text))
codes = torch.tensor([vocabulary.index(c) for c in text])


class Blocks(Dataset):
    """A random stretch of the text for each item, as nanoGPT takes them."""

    def __len__(self):
        return 160

    def __getitem__(self, _):
        start = int(torch.randint(len(codes) - BLOCK - 1, ()))
        return codes[start : start + BLOCK], codes[start + 1 : start + BLOCK + 1]


class GPT(nn.Module):
    def __init__(self, size, width=32):
        super().__init__()
        self.tokens = nn.Embedding(size, width)
        self.positions = nn.Embedding(BLOCK, width)
        layer = nn.TransformerEncoderLayer(width, 2, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size, bias=False)
        self.head.weight = self.tokens.weight  # tied
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(BLOCK), persistent=False)

    def forward(self, x):
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x, mask=self.mask, is_causal=True)))


def forward(model, batch):
    x, y = batch
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    trainer.log("perplexity", loss.detach().exp())
    return loss


model = GPT(len(vocabulary))
decay = [p for p in model.parameters() if p.dim() >= 2]
no_decay = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
    lr=3e-3,
    betas=(0.9, 0.95),
)
schedule = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=UPDATES - WARMUP),
    ],
    milestones=[WARMUP],
)
trainer = Trainer(
    model,
    optimizer,
    None,
    DataLoader(Blocks(), batch_size=8),
    epochs=2,
    forward=forward,
    accumulate=2,
    clip_grad_norm=1.0,
    scheduler=LRScheduling(schedule, every="batch"),
    checkpoint=Checkpointing(every_batches=7),
    track=None,
    name="gpt",
    root=options.root,
)
trainer.fit(resume="auto")
print(fingerprint(trainer))
