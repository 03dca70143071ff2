"""The data that a run was trained on, as a tracking server shows it: from the fingerprint in a checkpoint."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = ["DataInput", "TakesInputs", "input_in"]


@dataclass(frozen=True)
class DataInput:
    """A data set: its name, a digest that other data does not have, what it was used for, and more to know of it."""

    name: str
    digest: str
    context: str
    profile: Mapping[str, Any]


@runtime_checkable
class TakesInputs(Protocol):
    """A delivery that has a place for data sets; not every backend has."""

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        """Show what the run was trained on; again is once."""


def input_in(checkpoint: Path) -> DataInput | None:
    """The training data that the manifest of a checkpoint tells of; None if it tells of none, or is not there."""
    try:
        data = json.loads((checkpoint / "manifest.json").read_text())["data"]
        kind = data["data set"]["type"] if "data set" in data else data["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # How the data is cut into batches is not what it is.
    identity = {
        key: value
        for key, value in data.items()
        if key not in ("sampler", "batch size", "drop_last", "number of batches")
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    name = str(kind).rpartition(".")[2]
    return DataInput(name, hashlib.sha256(text.encode()).hexdigest()[:16], "training", data)
