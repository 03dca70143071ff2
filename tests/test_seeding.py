"""seed_everything: the same seed gives the same draws everywhere; what is no seed changes nothing."""

import random

import numpy as np
import pytest
import torch

from orchestrator.errors import ConfigurationError
from orchestrator.seeding import seed_everything


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]


def test_the_same_seed_gives_the_same_draws() -> None:
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert not set(draws()) & set(first)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(3)])
def test_whole_numbers_in_range_are_seeds(seed: int) -> None:
    seed_everything(seed)
    assert torch.initial_seed() == int(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "7", None, True])
def test_anything_else_is_refused_and_nothing_is_seeded(seed: object) -> None:
    seed_everything(7)
    expected = draws()
    seed_everything(7)
    with pytest.raises(ConfigurationError, match="expected a whole number from 0 to 4294967295"):
        seed_everything(seed)  # type: ignore[arg-type]
    assert draws() == expected
