"""The seam between a run and a tracking server: what the user's process names, and what the shipper speaks to.

A backend is one file: a `Tracker` (a small value made in the user's process, which imports nothing slow) and a
`Delivery` (made by the shipper, in a process of its own). `tracking.mlflow_delivery` is the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

from states.errors import InterlockError

__all__ = [
    "CHECKPOINTS",
    "BackendError",
    "Closed",
    "Delivery",
    "Destination",
    "Ending",
    "Identity",
    "ModelDelivery",
    "Point",
    "Refused",
    "Remote",
    "Target",
    "Tracker",
    "TrackerError",
    "Unavailable",
    "Upload",
    "open_delivery",
]

Upload = Literal["best+last", "all", "none"]
"""Which checkpoints are uploaded."""

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints at the server; each lies in one of its own name, complete, manifest last."""

Ending = Literal["finished", "failed", "killed"]
"""How a run that nobody works on is shown: done; an exception; a signal, a halt, or without a word."""


class TrackerError(InterlockError):
    """A tracker's setting that makes no sense."""


class BackendError(InterlockError):
    """What a server, or the way to it, did instead of taking what it was given."""


class Unavailable(BackendError):
    """No answer, or one that says nothing about what was sent. It may have arrived. Try again later."""


class Refused(BackendError):
    """The server took a look at this item and will never take it."""


class Closed(BackendError):
    """Nothing can be delivered to this destination until a person has changed something."""


@dataclass(frozen=True)
class Destination:
    """Where a tracker wants its runs to go.

    `place` names the store: what was sent to one place is unknown at another. `settings` is all else that
    the backend needs to get there, JSON-able and independent of the working directory.
    """

    place: str
    settings: Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """Where runs are shown, as the user says it: a frozen value that imports no tracking library."""

    backend: ClassVar[str]
    """'MODULE:FUNCTION' that makes the Delivery, imported in the shipper's process only; the function is
    given the destination's settings."""

    @property
    def upload(self) -> Upload:
        """Which checkpoints are uploaded."""

    @property
    def patience_s(self) -> float:
        """Seconds that a server which cannot be reached is tried again after the training has ended."""

    def destination(self) -> Destination:
        """Look at the environment of the user's process, now, and say where runs go."""


@dataclass(frozen=True)
class Target:
    """What the shipper is told, kept in the run's folder: `sync` needs it when the user's process is gone.

    `folder` is the working directory that the training was started in; `token` tells one start from another.
    """

    backend: str
    place: str
    settings: Mapping[str, Any]
    upload: Upload
    patience_s: float
    folder: str
    token: str


@dataclass(frozen=True)
class Identity:
    """Who a run is, for the backend's own fields. `source` is the script, `user` who started it."""

    run_id: str
    name: str
    started_ns: int
    source: str
    user: str


@dataclass(frozen=True)
class Remote:
    """The run at the server.

    `owned` says that the user began it and ends it. `steps` holds the newest step that the server has of each
    of our keys; empty for a run that we made just now. `url` and `command` are how a person gets to see it.
    """

    run_id: str
    owned: bool
    steps: Mapping[str, int]
    url: str
    command: str


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric; `time_ms` is since 1970."""

    key: str
    step: int
    time_ms: int
    value: float


class Delivery(Protocol):
    """One run's line to a server, spoken in the shipper's process.

    `open` comes first. Every method may raise Unavailable (the caller tries again), and Closed; those that send
    may raise Refused. What is sent again after Unavailable must not be there twice.
    """

    most_points: int
    """How many points may be sent at a time."""

    parent_tag: str
    """The tag with which the server shows a run below its parent, whose id there is the value; '': none."""

    def open(self, run: Identity, known: str | None) -> Remote:
        """Find the run by our id (`known`: by its own), or make it; begin nothing twice."""

    def key(self, name: str) -> str:
        """The name under which a metric is shown."""

    def params(self, values: Mapping[str, str]) -> list[str]:
        """Send parameters, which never change; what was cut short or changed, in words."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, over what they were before."""

    def points(self, points: Sequence[Point]) -> None:
        """Send at most `most_points` points, all or none."""

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those of `points` that must be sent again after an answer that did not come."""

    def artifact(self, file: Path, folder: str) -> None:
        """Upload `file`, which is not changed afterwards, into `folder` ('' for the top), over what was there."""

    def remove_artifacts(self, folder: str) -> None:
        """Remove an uploaded folder; does nothing where the store cannot."""

    def running(self) -> None:
        """Show the run as being worked on."""

    def end(self, ending: Ending, time_ms: int) -> None:
        """Show the run as ended at `time_ms` since 1970."""

    def check(self) -> None:
        """Raise Closed if the run cannot be written to any more."""


@runtime_checkable
class ModelDelivery(Protocol):
    """A `Delivery` that takes the final model too. Its tracker has an attribute `log_model`, which is true."""

    def model(self, folder: Path, tags: Mapping[str, str], step: int) -> None:
        """Deliver the model in `folder`, after `step` batches, once: it is known by `tags["interlock.model"]`.

        Raises as the methods of `Delivery` do.
        """


def open_delivery(target: Target) -> Delivery:
    """The delivery of `target`'s backend. Raises Closed if there is no such backend here."""
    module, _, function = target.backend.partition(":")
    try:
        make = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise Closed(
            f"tracking backend {target.backend!r}: cannot be imported ({error}); is it installed?"
        ) from error
    return cast(Delivery, make(target.settings))
