"""What each script prints at its end: one digest of the weights, the optimizers' state and every loss."""

import hashlib
from typing import Any

import torch
from torch import nn

from orchestrator import Trainer
from tracking.journal import Journal

MEASURED = ("duration", "batch_time")


def fingerprint(trainer: Trainer, *others: nn.Module) -> str:
    """SHA-256 of the model, of `others` beside it, of optimizers, history, and the loss of every batch."""
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        losses = [
            (row.epoch, row.batch, row.phase, row.loss)
            for row in journal.transitions(scope="train")
            if row.trigger.value == "forward"
        ]
    history = [{k: v for k, v in epoch.items() if k not in MEASURED} for epoch in trainer.history]
    digest = hashlib.sha256()
    for part in (
        [module.state_dict() for module in (trainer.model, *others)],
        [optimizer.state_dict() for optimizer in trainer.optimizers],
        history,
        losses,
    ):
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(
            f"{value.dtype} {tuple(value.shape)} ".encode() + plain.view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(repr(key).encode())
            _feed(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} ".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())
