"""The pairs of programs in docs/migrating.md, run: another library's and ours, which must train the same weights.

`python tests/migrations.py` runs those whose library is installed, and says what came out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import orchestrator
import states

DOCUMENT = Path(__file__).parent.parent / "docs" / "migrating.md"
PAIRS = {
    "a loop of your own": ("torch",),
    "Lightning": ("lightning",),
    "Ignite": ("ignite",),
    "the Hugging Face Trainer": ("transformers", "accelerate"),
}
"""The sections, and what has to be installed for them."""
ORDERED_OTHERWISE = ("the Hugging Face Trainer",)
"""Whose batches come in an order of its own, so that only the same data in one batch can be compared."""


def classification() -> dict[str, Any]:
    """A network of 64 inputs, a loss and two loaders in a fixed order."""
    torch.manual_seed(5)
    inputs = torch.randn(48, 64)
    data = TensorDataset(inputs, inputs[:, :10].argmax(1))
    return {
        "model": nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10)),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(data, batch_size=8),
        "val_loader": DataLoader(data, batch_size=16),
    }


class Tagger(nn.Module):
    """A model that takes a dict and returns its loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.output(self.embedding(input_ids).mean(1))
        return Output(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Output(dict[str, Tensor]):
    """Read by key and by attribute."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of samples."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def text() -> dict[str, Any]:
    """A model of token ids, a data set of dicts, and what makes batches of it."""
    torch.manual_seed(5)
    dataset = [{"input_ids": torch.randint(20, (5,)), "labels": torch.randint(4, ())} for _ in range(24)]
    return {"model": Tagger(), "dataset": dataset, "collate": collate}


def programs(section: str) -> tuple[str, str]:
    """The two programs of a section: the other one, and ours."""
    part = DOCUMENT.read_text().split(f"\n## From {section}\n")[1].split("\n## ")[0]
    theirs, ours = re.findall(r"^```python\n(.*?)^```$", part, re.S | re.M)
    return theirs, ours


def weights(program: str, names: dict[str, Any]) -> dict[str, Tensor]:
    """What a program leaves in `names["model"]`, run in a folder of its own."""
    public = {name: getattr(module, name) for module in (orchestrator, states) for name in module.__all__}
    namespace = {**public, "torch": torch, "nn": nn, "DataLoader": DataLoader, **names}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        exec(compile(program, str(DOCUMENT), "exec"), namespace)
        trainer = namespace.get("trainer")
        if isinstance(trainer, orchestrator.Trainer):
            trainer.close()
    return {name: value.detach().clone() for name, value in names["model"].state_dict().items()}


def compare(section: str) -> SimpleNamespace:
    """Both programs from the same weights: `same`, bit for bit, and the greatest `difference`."""
    theirs, ours = programs(section)
    setup = text if section in ORDERED_OTHERWISE else classification
    if section in ORDERED_OTHERWISE:  # one batch has all the data, in whatever order
        theirs, ours = (
            theirs.replace("batch_size=8", "batch_size=24"),
            ours.replace("batch_size=8", "batch_size=24"),
        )
    one, other = weights(theirs, setup()), weights(ours, setup())
    trained = setup()["model"].state_dict()
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], trained[name]) for name in one), "nothing was trained"
    return SimpleNamespace(
        same=all(torch.equal(one[name], other[name]) for name in one),
        difference=max(float((one[name].double() - other[name].double()).abs().max()) for name in one),
    )


def installed(section: str) -> bool:
    """Whether the other program can be run here."""
    return all(importlib.util.find_spec(module) is not None for module in PAIRS[section])


if __name__ == "__main__":
    for section in PAIRS:
        if not installed(section):
            print(f"{section}: not installed here")
            continue
        found = compare(section)
        print(
            f"{section}: {'the same weights' if found.same else f'weights differ by {found.difference:.1e}'}"
        )
