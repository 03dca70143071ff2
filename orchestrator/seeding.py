"""seed_everything: one seed for all global random generators, set before the model is built."""

from __future__ import annotations

import random
from operator import index
from typing import SupportsIndex

import numpy as np
import torch

from orchestrator.errors import ConfigurationError

__all__ = ["seed_everything"]

_LIMIT = 2**32


def seed_everything(seed: SupportsIndex) -> None:
    """Seed the global generators of Python, NumPy and torch, on the CPU and on every device.

    Call it before the model is built: a trainer cannot seed what exists already.

    Args:
        seed: a whole number from 0 to 2**32 - 1, as NumPy takes no other.

    Raises:
        ConfigurationError: `seed` is anything else; then nothing was seeded.
    """
    number = _whole(seed)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _whole(seed: SupportsIndex) -> int:
    try:
        number = None if isinstance(seed, bool) else index(seed)
    except TypeError:
        number = None
    if number is None or not 0 <= number < _LIMIT:
        raise ConfigurationError(f"the seed is {seed!r}; expected a whole number from 0 to {_LIMIT - 1}")
    return number
