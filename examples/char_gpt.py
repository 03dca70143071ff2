"""A character-level GPT that learns to write Python from the standard library's own sources.

bf16, gradient accumulation, warmup and then cosine, an average of the weights, and a sample of what it writes at the
end of each epoch: printed, and kept as the artifacts samples/. Stop it, kill it, run it again: it goes on.
"""

import argparse
import string
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset

from orchestrator import EMA, Checkpointing, LRScheduling, Trainer, seed_everything
from states import Trigger

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--epochs", type=int, default=6)
arguments.add_argument("--characters", type=int, default=200_000, help="how much is read (default: 200,000)")
arguments.add_argument("--width", type=int, default=96, help="of the model (default: 96)")
arguments.add_argument(
    "--precision",
    choices=("bf16", "fp32"),
    default="bf16" if torch.cuda.is_available() else "fp32",
    help="default: bf16 on a GPU, else fp32, since most processors have to imitate bf16 and take longer for it",
)
arguments.add_argument("--name", default="char-gpt", help="the run's name (default: char-gpt)")
options = arguments.parse_args()

CONTEXT, BATCH, ACCUMULATE = 64, 16, 2
CHARACTERS = string.printable


def read_sources(length):
    """So many characters of the standard library, each as its place in CHARACTERS."""
    place = {character: number for number, character in enumerate(CHARACTERS)}
    codes = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        codes += [place[character] for character in file.read_text("utf-8") if character in place]
        if len(codes) >= length:
            return torch.tensor(codes[:length])
    return torch.tensor(codes)


class Windows(Dataset):
    """Stretches of CONTEXT characters, and for each character the one that follows."""

    def __init__(self, codes):
        self.codes = codes

    def __len__(self):
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index):
        window = self.codes[index * CONTEXT :][: CONTEXT + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width, depth=3):
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS))

    def forward(self, x):
        x = self.characters(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@torch.no_grad()
def write(model, prompt, length, seed):
    """Continue the prompt. Its random numbers are its own, so that looking on does not change the training."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor([[CHARACTERS.index(character) for character in prompt]])
    for _ in range(length):
        scores = model(codes[:, -CONTEXT:])[0, -1]
        following = torch.multinomial(F.softmax(scores / 0.7, dim=0), 1, generator=generator)
        codes = torch.cat([codes, following[None]], dim=1)
    return "".join(CHARACTERS[code] for code in codes[0])


torch.set_num_threads(1)  # the fastest for a network this small
seed_everything(1337)
codes = read_sources(options.characters)
held_out = len(codes) // 10
train, val = Windows(codes[:-held_out]), Windows(codes[-held_out:])
train_loader = DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True)

model = GPT(options.width)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
updates = options.epochs * -(-len(train_loader) // ACCUMULATE)
warmup = updates // 10
schedule = SequentialLR(
    optimizer,
    [LinearLR(optimizer, 0.01, total_iters=warmup), CosineAnnealingLR(optimizer, updates - warmup)],
    milestones=[warmup],
)
ema = EMA(decay=0.98, validate=True)


def forward(model, batch):
    inputs, following = batch
    loss = F.cross_entropy(model(inputs).flatten(0, 1), following.flatten())
    trainer.log("perplexity", loss.detach().exp())
    return loss


trainer = Trainer(
    model,
    optimizer,
    None,
    train_loader,
    DataLoader(val, batch_size=BATCH),
    epochs=options.epochs,
    forward=forward,
    precision=options.precision,
    accumulate=ACCUMULATE,
    clip_grad_norm=1.0,
    scheduler=LRScheduling(schedule, every="batch"),
    callbacks=[ema],
    checkpoint=Checkpointing(overhead=0.03),
    config=options,
    name=options.name,
)


@trainer.after(Trigger.END_EPOCH)
def sample():
    text = write(ema.model.eval(), "def ", 200, seed=trainer.epoch)
    trainer.say(f"what it writes after epoch {trainer.epoch}:\n{text}\n")
    with trainer.artifact(f"samples/epoch-{trainer.epoch:02}.txt") as file:
        file.write_text(text)


result = trainer.fit(resume="auto")
for name in ("loss", "val/loss", "val/perplexity"):
    print(f"{name:15}", *(f"{epoch[name]:6.2f}" for epoch in result.history))
print(f"its samples are in {result.run}/artifacts/samples")
