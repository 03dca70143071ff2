"""What importing costs, counted in modules: seconds are measured by `make bench`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# psutil tells processes apart, six is what transitions imports, of numpy it is numpy.random.
OURS = {"orchestrator", "tracking", "states", "transitions", "six", "psutil", "numpy", "xxhash"}

_NEW = """
import json, sys
{before}
there = set(sys.modules)
{then}
print(json.dumps(sorted(sys.modules.keys() - there)))
"""


def new_modules(before: str, then: str, where: Path) -> set[str]:
    """The modules that `then` brings in besides those of `before`, in a process of its own."""
    script = _NEW.format(before=before, then=then)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=where, check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """Those that are not of the standard library; what Cython adds by itself is left out."""
    tops = {name.partition(".")[0] for name in modules}
    return {
        name
        for name in tops - sys.stdlib_module_names
        if "cython" not in name and "sysconfigdata" not in name
    }


def test_the_trainer_brings_in_little_besides_torch(tmp_path: Path) -> None:
    new = new_modules("import torch", "from orchestrator import Trainer", tmp_path)
    assert packages(new) == OURS
    assert not {name for name in new if name.startswith("torch.")}
    looking_back = {
        "orchestrator.aside",
        "orchestrator.past",
        "orchestrator.rehearsal",
        "orchestrator.blame",
        "orchestrator.anomaly",
        "orchestrator.retrieval",
    }
    shippers = {"tracking.shipment", "tracking.uploads", "tracking.artifacts", "tracking.source"}
    assert not new & (looking_back | shippers)


_BY_HAND = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters())
batches = [(torch.ones(1, 2), torch.ones(1, 1))] * 3
for inputs, targets in batches:
    optimizer.zero_grad()
    torch.nn.MSELoss()(model(inputs), targets).backward()
    optimizer.step()
"""
_TRAINED = """
from orchestrator import MLflow, Trainer
Trainer(model, optimizer, torch.nn.MSELoss(), batches, batches, epochs=1,
        track=MLflow("sqlite:///mlflow.db", log_model=False)).fit()
"""


@pytest.mark.usefixtures("own_store")
def test_a_training_that_nobody_watches_needs_no_more(tmp_path: Path) -> None:
    new = new_modules(_BY_HAND, _TRAINED, tmp_path)
    assert packages(new) <= OURS  # torch's optimizers have brought in numpy.random, and half of torch
    assert not {name for name in new if name.startswith("torch.")}


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("states", {"states", "transitions", "six"}),
        ("tracking.shipper", {"tracking", "states", "transitions", "six"}),
    ],
)
def test_the_rooms_below_bring_in_neither_torch_nor_numpy(
    tmp_path: Path, room: str, allowed: set[str]
) -> None:
    assert packages(new_modules("", f"import {room}", tmp_path)) == allowed
