"""The errors a training can raise, beside those that its parts define."""

from __future__ import annotations

import re
from typing import Any

from states.errors import InterlockError

__all__ = [
    "ConfigurationError",
    "LossError",
    "NonFiniteAgainError",
    "NonFiniteError",
    "TaintedError",
    "an",
    "kind_of",
]


def an(noun: str) -> str:
    """`noun` with its article, as it is spoken: an int, an SGD, an ndarray, a UNet."""
    letters = noun[:2].isupper() and len(noun) > 1
    vowel = noun[0] in "AEFHILMNORSX" if letters else noun[0] in "aeioAEIO" or noun.startswith("nd")
    return f"{'an' if vowel else 'a'} {noun}"


def kind_of(value: Any) -> str:
    """What `value` is, for a message: None, the class Adam, an int."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else an(type(value).__name__)


class ConfigurationError(InterlockError, ValueError):
    """An argument, or a combination of them, that cannot be honoured. Nothing was started."""


class LossError(InterlockError, TypeError):
    """What `forward` or `loss_fn` returned is not a scalar floating-point tensor."""


class TaintedError(InterlockError):
    """Memory is in the middle of a transition that failed; it cannot be saved or continued."""


class NonFiniteError(InterlockError):
    """A loss or a gradient was NaN or infinite and `nonfinite="halt"` was asked for.

    The weights are those from before the batch. `epoch` and `batch` say where, `statistics` holds for
    each parameter with non-finite gradients how many of its elements are not finite. (On an accelerator, where it is
    noticed when the gradients are gone, 1 for each.)
    """

    def __init__(self, what: str, epoch: int, batch: int, loss: float, statistics: dict[str, int]) -> None:
        worst = sorted(statistics.items(), key=lambda item: -item[1])[:5]
        self.epoch = epoch
        self.batch = batch
        self.loss = loss
        self.statistics = statistics
        self.found = f"non-finite {what} in epoch {epoch}, batch {batch}, where the loss is {loss}"
        super().__init__(
            f"{self.found}; elements of gradients that are not finite, by parameter: "
            f"{', '.join(f'{name} ({count})' for name, count in worst) or 'none'}. The weights are those from "
            'before this batch. Pass nonfinite="skip" to leave out such batches, or look at the data of this one'
        )

    @staticmethod
    def place_in(text: str) -> tuple[int, int] | None:
        """Epoch and batch that a message of this error, or its `found`, names; None where it is no such message."""
        match = re.search(r"non-finite (?:loss|gradient) in epoch (\d+), batch (\d+)", text)
        return None if match is None else (int(match[1]), int(match[2]))


class NonFiniteAgainError(InterlockError):
    """A resume that would only meet the NaN or infinity again that the run halted on."""
