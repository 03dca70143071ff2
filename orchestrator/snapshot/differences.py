"""How a checkpoint differs from what it is to be restored into, and the error that says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from states.errors import InterlockError

__all__ = ["Comparison", "IncompatibleStateError", "UnsupportedStateError", "describe", "refuse"]


class IncompatibleStateError(InterlockError):
    """A captured state does not fit; nothing was changed. `differences` lists every reason."""

    def __init__(self, what: str, differences: Iterable[str]) -> None:
        self.differences = tuple(differences)
        listed = "\n".join(f"  {difference}" for difference in self.differences)
        super().__init__(
            f"the checkpoint does not fit {what}:\n{listed}\n"
            "Build it as the checkpoint's training did, or begin a new run."
        )


class UnsupportedStateError(InterlockError, TypeError):
    """Something has state that cannot be captured exactly."""


@dataclass(frozen=True)
class Comparison:
    """What differs: what rules restoring out, and hyper-parameters, of which the checkpoint's win.

    Each begins with what it is about; that of a hyper-parameter with its name.
    """

    incompatible: tuple[str, ...] = ()
    hyperparameters: tuple[str, ...] = ()


def describe(tensor: Tensor) -> str:
    """Shape and dtype as errors show them: `(32, 64) float32`."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def refuse(what: str, differences: Iterable[str]) -> None:
    """Raise IncompatibleStateError if there are any `differences` from `what`."""
    listed = list(differences)
    if listed:
        raise IncompatibleStateError(what, listed)
