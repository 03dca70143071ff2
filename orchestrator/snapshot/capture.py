"""What a training state is: capture, restore and compare for each of its parts, under one roof."""

from __future__ import annotations

from orchestrator.snapshot.attributes import (
    Built,
    capture_attributes,
    other_constants,
    restore_attributes,
)
from orchestrator.snapshot.differences import Comparison, IncompatibleStateError, UnsupportedStateError
from orchestrator.snapshot.digests import digests, first_difference
from orchestrator.snapshot.flags import compare_flags, numeric_flags
from orchestrator.snapshot.gradients import capture_gradients, restore_gradients
from orchestrator.snapshot.metric_states import capture_metric, compare_metric, restore_metric
from orchestrator.snapshot.modules import capture_module, compare_module, restore_module, restore_weights
from orchestrator.snapshot.names import parameter_names, unwrapped
from orchestrator.snapshot.optimizers import capture_optimizer, compare_optimizer, restore_optimizer
from orchestrator.snapshot.randomness import capture_random, restore_random
from orchestrator.snapshot.schedulers import (
    capture_scaler,
    capture_scheduler,
    compare_scheduler,
    given_settings,
    restore_scaler,
    restore_scheduler,
)

__all__ = [
    "Built",
    "Comparison",
    "IncompatibleStateError",
    "UnsupportedStateError",
    "capture_attributes",
    "capture_gradients",
    "capture_metric",
    "capture_module",
    "capture_optimizer",
    "capture_random",
    "capture_scaler",
    "capture_scheduler",
    "compare_flags",
    "compare_metric",
    "compare_module",
    "compare_optimizer",
    "compare_scheduler",
    "digests",
    "first_difference",
    "given_settings",
    "numeric_flags",
    "other_constants",
    "parameter_names",
    "restore_attributes",
    "restore_gradients",
    "restore_metric",
    "restore_module",
    "restore_optimizer",
    "restore_random",
    "restore_scaler",
    "restore_scheduler",
    "restore_weights",
    "unwrapped",
]
