"""What a tracking server has of a run, brought to this machine: references, and a child process that downloads.

The child speaks to the server (`tracking.mlflow_fetching`), so that no tracking library is imported here. It is asked
in lines of JSON, one for each request, and answers in the same way.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from states.errors import InterlockError
from tracking import processes
from tracking.delivery import Destination
from tracking.masking import mask_text
from tracking.rows import Checkpoint
from tracking.runs import RunFolder

__all__ = [
    "PREFIX",
    "FetchError",
    "Fetched",
    "Reference",
    "RemoteFiles",
    "Seen",
    "choose",
    "fetched",
    "is_reference",
    "keep_fetched",
    "parse_reference",
]

PREFIX = "mlflow:"
"""What a reference to a run at a server begins with."""

WAIT_S = 60.0
"""How long a server that cannot be reached is tried again."""

_FORMS = '"mlflow:RUN_ID", "mlflow:RUN_ID@best", "mlflow:RUN_ID@epoch=2" or "mlflow:RUN_ID@epoch=2,batch=113"'
_REFERENCE = re.compile(
    r"mlflow:(?P<id>[\w\-]+)(@(?P<which>last|best|epoch=(?P<epoch>\d+)(,batch=(?P<batch>\d+))?))?"
)


class FetchError(InterlockError):
    """A run cannot be had from the tracking server."""


@dataclass(frozen=True)
class Reference:
    """A run at a server, by the server's own id, and which of its checkpoints is meant.

    `which` is 'last', 'best' or 'place': the newest checkpoint of `epoch`, or of its `batch`.
    """

    run_id: str
    which: str = "last"
    epoch: int = -1
    batch: int | None = None

    def __str__(self) -> str:
        if self.which == "place":
            batch = "" if self.batch is None else f",batch={self.batch}"
            return f"{PREFIX}{self.run_id}@epoch={self.epoch}{batch}"
        return f"{PREFIX}{self.run_id}" + ("" if self.which == "last" else f"@{self.which}")


def is_reference(text: object) -> bool:
    """Does it name a run at a server?"""
    return isinstance(text, str) and text.startswith(PREFIX)


def parse_reference(text: str) -> Reference:
    """The reference that `text` is; raises FetchError."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise FetchError(f"{text!r}: cannot be read; expected {_FORMS}")
    if found["epoch"] is None:
        return Reference(found["id"], found["which"] or "last")
    return Reference(
        found["id"], "place", int(found["epoch"]), None if found["batch"] is None else int(found["batch"])
    )


def choose(reference: Reference, rows: Sequence[Checkpoint], there: Mapping[str, int]) -> list[Checkpoint]:
    """The uploaded checkpoints that `reference` means, the first choice first. A pure function.

    `rows` are those of the run's journal that stand, removed ones included, oldest first; `there` are the names of
    those at the server. Raises FetchError, which names what there is.
    """
    newest_first = [row for row in reversed(rows) if row.name in there]
    if not newest_first:
        raise FetchError(
            f"{reference}: no checkpoint of this run is at the server; expected one to go on from. Either none was "
            'made before its machine was lost, or it was tracked with upload="none"'
        )
    if reference.which == "last":
        return newest_first
    if reference.which == "best":
        found = [row for row in newest_first if row.best][:1]
        wanted = 'a best one (Checkpointing(best="val/loss"))'
    else:
        found = [
            row
            for row in newest_first
            if row.epoch == reference.epoch and reference.batch in (None, row.batch)
        ][:1]
        wanted = f"one of epoch {reference.epoch}"
        wanted += "" if reference.batch is None else f", batch {reference.batch}"
    if not found:
        names = ", ".join(row.name for row in reversed(newest_first))
        raise FetchError(f"{reference}: expected {wanted} among the uploaded checkpoints; found {names}")
    return found


@dataclass(frozen=True)
class Seen:
    """A run as the server shows it: our id of it, its tags and status, sizes of uploaded files and checkpoints.

    `files` are those at the top; `checkpoints` are complete ones, by name.
    """

    run_id: str
    ours: str
    status: str
    tags: Mapping[str, str]
    files: Mapping[str, int]
    checkpoints: Mapping[str, int]

    @property
    def attempt(self) -> int:
        """The newest attempt that the server knows of; 0 for none."""
        text = self.tags.get("interlock.attempt", "")
        return int(text) if text.isdecimal() else 0


class RemoteFiles:
    """The files of runs at a server, spoken to by a child process that lives as long as this is open.

    Every method raises FetchError, with the server's answer, if it cannot; a server that cannot be reached is tried
    again for `wait_s` seconds.
    """

    def __init__(self, destination: Destination, wait_s: float | None = None):
        self.place = mask_text(destination.place)
        self._settings = {**destination.settings, "wait_s": WAIT_S if wait_s is None else wait_s}
        self._child: subprocess.Popen[str] | None = None

    def look(self, run_id: str) -> Seen:
        """What there is of the run whose id at the server is `run_id`."""
        return Seen(**self._ask(what="look", run_id=run_id))

    def download(self, run_id: str, path: str, folder: Path) -> Path:
        """Download an artifact, a file or a folder, into `folder`; where it lies."""
        return Path(str(self._ask(what="download", run_id=run_id, path=path, folder=str(folder))["path"]))

    def _ask(self, **request: str) -> dict[str, Any]:
        child = self._child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = ""
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise FetchError(
                f"{self.place}: the process that downloads ended without an answer (exit status {child.poll()}); what "
                "it said is above"
            ) from error
        if "error" in answer:
            raise FetchError(f"{self.place}: {mask_text(str(answer['error']))}")
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            processes.command("tracking.mlflow_fetching"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=processes.environment(),
            text=True,
            start_new_session=True,  # Ctrl-C is for the trainer, which closes this
        )
        assert child.stdin is not None
        child.stdin.write(json.dumps(self._settings) + "\n")
        return child

    def __enter__(self) -> "RemoteFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


# -- what the run's folder keeps of it ---------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """Where a run's folder was fetched from, and what was there: the shipper goes on with that remote run.

    `artifacts` are the sizes of what the server had, by path.
    """

    place: str
    remote_run_id: str
    artifacts: Mapping[str, int]


def fetched(run: RunFolder) -> Fetched | None:
    """Where the run's folder was fetched from; None if it was made here."""
    try:
        found = json.loads((run.path / "fetched.json").read_text())
        return Fetched(str(found["place"]), str(found["remote_run_id"]), dict(found["artifacts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_fetched(folder: Path, found: Fetched) -> None:
    """Write it down in a run's folder."""
    file = os.open(folder / "fetched.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(file, "w") as stream:  # a tracking URI may have a password in it
        json.dump(vars(found), stream, indent=1)
