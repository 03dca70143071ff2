"""The data that a run was trained and validated on, as a tracking server shows it: from a checkpoint's fingerprint."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tracking.delivery import Delivery, Refused, Unavailable
from tracking.journal import Journal
from tracking.runs import RunFolder

__all__ = ["DataInput", "DataSender", "TakesInputs", "inputs_in"]

_TRIES = 5


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
        """Show what the run was trained and validated on; again is once."""


def inputs_in(checkpoint: Path) -> list[DataInput]:
    """The data that a checkpoint's manifest tells of, training first; none if it tells of none, or is not there."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        found = [_input(manifest["data"], "training")]
        for name, data in manifest.get("validation_data", {}).items():
            found.append(_input(data, "validation" if name == "val" else f"validation/{name}"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return found


def _input(data: Mapping[str, Any], context: str) -> DataInput:
    kind = data["data set"]["type"] if "data set" in data else data["kind"]
    # How the data is cut into batches is not what it is.
    identity = {
        key: value
        for key, value in data.items()
        if key not in ("sampler", "batch size", "drop_last", "number of batches")
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    name = str(kind).rpartition(".")[2]
    return DataInput(name, hashlib.sha256(text.encode()).hexdigest()[:16], context, data)


class DataSender:
    """Sends what a run is trained and validated on, once a checkpoint tells. Nothing else waits for it."""

    def __init__(self, run: RunFolder, journal: Journal, notice: Callable[[str], None]):
        self._run, self._journal, self._notice = run, journal, notice
        self._tries = _TRIES

    def send(self, delivery: Delivery) -> None:
        """Send it if there is something to send; a server that cannot take it is asked a few times."""
        if self._tries <= 0 or not isinstance(delivery, TakesInputs):
            return
        folders = (self._run.checkpoints / row.name for row in reversed(self._journal.checkpoints()))
        found = next(filter(None, map(inputs_in, folders)), None)
        if found is None:
            return
        self._tries -= 1
        try:
            delivery.inputs(found)
            self._tries = 0
        except (Refused, Unavailable) as error:  # one that is too old has no answer, like one that is away
            if not self._tries or isinstance(error, Refused):
                self._tries = 0
                self._notice(f"data set {found[0].name}: {error}")
