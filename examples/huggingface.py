"""Train a transformer of Hugging Face's to tell which package of the standard library a function is from.

A small DistilBERT, built from a configuration: nothing is downloaded. The loader yields dicts, which are what the
model is called with, and the loss is the model's own. Stop it, kill it, run it again: it goes on.
"""

import argparse
import ast
import re
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from orchestrator import Checkpointing, EarlyStopping, LRScheduling, Trainer, seed_everything

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--epochs", type=int, default=6)
arguments.add_argument("--functions", type=int, default=400, help="of each package, at most (default: 400)")
arguments.add_argument("--name", default="huggingface", help="the run's name (default: huggingface)")
options = arguments.parse_args()

PACKAGES = ["asyncio", "email", "importlib", "multiprocessing", "unittest", "xml"]
LENGTH, WORDS = 48, 3000
PADDING, UNKNOWN = 0, 1


def functions_of(package):
    """The source of each function in the package's files."""
    for file in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
        source = file.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "test" not in file.parts:
                yield "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def words_of(text):
    return re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)


def encode(words, label):
    """A dict such as tokenizers of Hugging Face make, with the label in it."""
    ids = [vocabulary.get(word, UNKNOWN) for word in words[:LENGTH]]
    padding = LENGTH - len(ids)
    return {
        "input_ids": torch.tensor(ids + [PADDING] * padding),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
        "labels": torch.tensor(label),
    }


texts, labels = [], []
for label, package in enumerate(PACKAGES):
    for text in islice(functions_of(package), options.functions):
        texts.append(words_of(text))
        labels.append(label)
parts = train_test_split(texts, labels, test_size=0.2, stratify=labels, random_state=7)
train_texts, val_texts, train_labels, val_labels = parts
counts = Counter(word for text in train_texts for word in text)
vocabulary = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS), start=2)}
train = [encode(*pair) for pair in zip(train_texts, train_labels, strict=True)]
val = [encode(*pair) for pair in zip(val_texts, val_labels, strict=True)]

torch.set_num_threads(1)  # the fastest for a network this small
seed_everything(7)
config = DistilBertConfig(
    vocab_size=len(vocabulary) + 2,
    max_position_embeddings=LENGTH,
    dim=64,
    hidden_dim=128,
    n_layers=2,
    n_heads=4,
    pad_token_id=PADDING,
    num_labels=len(PACKAGES),
)
model = DistilBertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
train_loader = DataLoader(train, batch_size=32, shuffle=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=2e-3, total_steps=options.epochs * len(train_loader), pct_start=0.1
)


def forward(model, batch):
    output = model(**batch)
    return output.loss, output.logits, batch["labels"]


trainer = Trainer(
    model,
    optimizer,
    None,
    train_loader,
    DataLoader(val, batch_size=128),
    epochs=options.epochs,
    forward=forward,
    metrics={"accuracy": lambda logits, labels: (logits.argmax(1) == labels).float().mean()},
    clip_grad_norm=1.0,
    scheduler=LRScheduling(schedule, every="batch"),
    callbacks=[EarlyStopping("val/loss", patience=2)],
    checkpoint=Checkpointing(best="val/accuracy"),
    config=options,
    name=options.name,
)
result = trainer.fit(resume="auto")

result.load_best(model)
model.eval()
print(f"{len(train)} functions to learn from, {len(val)} held out; of those held out it tells")
print(f"{max(epoch['val/accuracy'] for epoch in result.history):.1%} right, such as:")
for words, label in list(zip(val_texts, val_labels, strict=True))[:6]:
    example = {key: value[None] for key, value in encode(words, label).items()}
    probabilities = model(**example).logits.softmax(1)[0]
    guess = int(probabilities.argmax())
    print(
        f"  {' '.join(words[:10]):50.50}  {PACKAGES[label]:15} {PACKAGES[guess]:15} {probabilities[guess]:.0%}"
    )
