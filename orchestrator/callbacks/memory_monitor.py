"""MemoryMonitor: how much memory the training process and its device use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from states.table import Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["MemoryMonitor"]

_MB = 1e6


class MemoryMonitor(Callback):
    """Logs memory in megabytes (10^6 bytes).

    "memory/rss_mb": resident memory of this process, data workers not included. On a CUDA device also
    "memory/device_mb", allocated by torch at the end of the batch, and "memory/device_max_mb", the most
    since the process began; neither waits for the device.

    Args:
        every_batches: on every so many batches, from the first on.
    """

    def __init__(self, every_batches: int = 100) -> None:
        check_whole("MemoryMonitor: every_batches", every_batches, unit="batch")
        self.every_batches = every_batches

    def attach(self, trainer: Trainer) -> None:
        """Hook `end_batch`, before the batch's values are folded into the epoch's."""
        super().attach(trainer)
        self._process = psutil.Process()
        trainer.before(Trigger.END_BATCH)(self._before_end_batch)

    def _before_end_batch(self) -> None:
        trainer = self.trainer
        if trainer.batches % self.every_batches:
            return
        trainer.log("memory/rss_mb", self._process.memory_info().rss / _MB)
        if trainer.device.type == "cuda":
            trainer.log("memory/device_mb", torch.cuda.memory_allocated(trainer.device) / _MB)
            trainer.log("memory/device_max_mb", torch.cuda.max_memory_allocated(trainer.device) / _MB)
