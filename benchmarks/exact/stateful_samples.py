"""The data set of the task with a `state_dict` for torchdata's StatefulDataLoader.

Its tutorial asks for one where data workers have "worker-specific state (eg RNG transform state)": the random states
of each worker. In the main process the random states are the training's, and left to who saves those.
"""

import random
from typing import Any

import numpy as np
import task
import torch
from torch.utils.data import get_worker_info


def random_states() -> dict[str, Any]:
    """Of torch, NumPy and Python, in this process."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` has returned."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


class StatefulSamples(task.Samples):
    """Samples whose augmentation goes on where it was, in a data worker."""

    def state_dict(self) -> dict[str, Any]:
        return random_states() if get_worker_info() else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if get_worker_info():
            set_random_states(state)
