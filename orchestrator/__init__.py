"""interlock: PyTorch training as an explicit state machine. The public names of the trainer.

They are imported when first used, so that the command line, which needs no tensors, starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.callbacks.base import Callback
    from orchestrator.callbacks.checkpointing import Checkpointing
    from orchestrator.callbacks.early_stopping import EarlyStopping
    from orchestrator.callbacks.ema import EMA
    from orchestrator.callbacks.gradient_statistics import GradientStatistics
    from orchestrator.callbacks.logs import Logging
    from orchestrator.callbacks.lr_scheduling import LRScheduling
    from orchestrator.callbacks.memory_monitor import MemoryMonitor
    from orchestrator.callbacks.parameter_digests import ParameterDigests
    from orchestrator.errors import NonFiniteError
    from orchestrator.phase import Phase
    from orchestrator.result import Result
    from orchestrator.seeding import seed_everything
    from orchestrator.trainer import Trainer
    from states.errors import InterlockError
    from tracking.delivery import Tracker
    from tracking.mlflow_delivery import MLflow
    from tracking.tensorboard_delivery import TensorBoard

__all__ = [
    "EMA",
    "Callback",
    "Checkpointing",
    "EarlyStopping",
    "GradientStatistics",
    "InterlockError",
    "LRScheduling",
    "Logging",
    "MLflow",
    "MemoryMonitor",
    "NonFiniteError",
    "ParameterDigests",
    "Phase",
    "Result",
    "TensorBoard",
    "Tracker",
    "Trainer",
    "seed_everything",
]

_HOMES = {
    "EMA": "orchestrator.callbacks.ema",
    "Callback": "orchestrator.callbacks.base",
    "Checkpointing": "orchestrator.callbacks.checkpointing",
    "EarlyStopping": "orchestrator.callbacks.early_stopping",
    "GradientStatistics": "orchestrator.callbacks.gradient_statistics",
    "InterlockError": "states.errors",
    "LRScheduling": "orchestrator.callbacks.lr_scheduling",
    "Logging": "orchestrator.callbacks.logs",
    "MLflow": "tracking.mlflow_delivery",
    "TensorBoard": "tracking.tensorboard_delivery",
    "MemoryMonitor": "orchestrator.callbacks.memory_monitor",
    "NonFiniteError": "orchestrator.errors",
    "ParameterDigests": "orchestrator.callbacks.parameter_digests",
    "Phase": "orchestrator.phase",
    "Result": "orchestrator.result",
    "Tracker": "tracking.delivery",
    "Trainer": "orchestrator.trainer",
    "seed_everything": "orchestrator.seeding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
