"""What there is to deliver of a run, and the delivering of it, one small step at a time."""

import getpass
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracking.artifacts import REPORTS
from tracking.delivery import (
    Closed,
    Delivery,
    Ending,
    Identity,
    ModelDelivery,
    Point,
    Refused,
    Remote,
    Target,
    Upload,
    open_delivery,
)
from tracking.journal import Attempt, Checkpoint, Journal
from tracking.one_off import OneOff
from tracking.outbox import Flight, Outbox, OutboxError, OutboxView, read_outbox, select
from tracking.packing import ROW_LENGTH
from tracking.rows import Outcome, Parent
from tracking.runs import RunFolder, folder_of_parent
from tracking.schema import UNPACKED_METRICS, connect_to_read

__all__ = ["CHECKPOINTS", "MODEL", "Shipment", "Waiting", "waiting"]

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints at the server; each lies in one of its own name, complete, manifest last."""

MODEL = "model"
"""What the final model is called here."""

_REPORTS = "reports"
_LONGEST_EXPORT_S = 1800.0
_STAGE = "uploading"
_FAILURES = "failures.json"
_EXPORTED = "exported.json"
_TAGS_EVERY_S = 2.0
_ROUND_EVERY_S = 15.0
_REPORTS_EVERY_S = 60.0
_GLANCE_S = 0.2  # how long to wait at a time for a process that makes something
_MOST_OF_THE_TIME = 4  # while a run trains, uploads of one kind take at most a fifth of it

_ENDINGS: dict[Outcome, Ending] = {
    "done": "finished",
    "failed": "failed",
    "stopped": "killed",
    "died": "killed",
}


@dataclass(frozen=True)
class Waiting:
    """What is still to be delivered: metric values (replayed ones included), and artifacts by their paths."""

    points: int
    artifacts: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.points or self.artifacts)


def waiting(run: RunFolder, journal: Journal, sent: OutboxView, upload: Upload) -> Waiting:
    """What the journal has and the outbox `sent` does not; reads the journal only."""
    attempts = journal.attempts()
    artifacts = [f"{CHECKPOINTS}/{row.name}" for row in wanted_checkpoints(journal.checkpoints(), upload)]
    missing = [path for path in artifacts if path not in sent.artifacts]
    if attempts and attempts[-1].outcome and sent.reports_sent < attempts[-1].attempt:
        missing += REPORTS
    if run.final_model.exists():
        missing.append(MODEL)
    return Waiting(_count_points(run, sent.cursor), tuple(missing))


def wanted_checkpoints(rows: list[Checkpoint], upload: Upload) -> list[Checkpoint]:
    """Which of a run's checkpoints (oldest first) belong at the server; the most urgent first."""
    if upload == "none":
        return []
    newest_first = rows[::-1]
    if upload == "all":
        return newest_first
    best = [row for row in newest_first if row.best][:1]
    return newest_first[:1] + [row for row in best if row is not newest_first[0]]


def _count_points(run: RunFolder, cursor: int) -> int:
    connection = connect_to_read(run.journal)
    try:
        rows = connection.execute(
            f"""SELECT count(*) FROM ({UNPACKED_METRICS} WHERE packed.id >= ?1 / {ROW_LENGTH})
                WHERE id > ?1 AND NOT superseded""",
            (cursor,),
        )
        return int(rows.fetchone()[0])
    finally:
        connection.close()


class Shipment:
    """One run on its way to one server. Every method may be interrupted at any point, by SIGKILL too.

    Those that speak to the server raise Unavailable, with nothing lost or done twice when they are called again.
    """

    def __init__(
        self,
        run: RunFolder,
        target: Target,
        outbox: Outbox,
        journal: Journal,
        notice: Callable[[str], None],
        *,
        at_once: bool = False,
    ):
        self._run, self._target, self._outbox, self._journal = run, target, outbox, journal
        self._notice = notice
        self._delivery: Delivery | None = None
        self._remote: Remote | None = None
        self._names: dict[str, str] = {}
        self._uncertain = outbox.flight() is not None
        self._refused: set[str] = set()
        self._skipped: set[str] = set()
        self._job: _Job | None = None
        self._round: list[str] = []
        self._round_began = 0.0
        wait = 0.0 if at_once else 1.0
        self._next_tags = 0.0
        self._next_round = time.monotonic() + wait * _ROUND_EVERY_S
        self._next_reports = time.monotonic() + wait * _REPORTS_EVERY_S
        self._told: set[str] = set()
        self._drop()

    @property
    def _target_text(self) -> str:
        return json.dumps([self._target.backend, self._target.settings], sort_keys=True)

    @property
    def opened(self) -> bool:
        """Is the run at the server known?"""
        return self._remote is not None

    def complete(self, attempt: Attempt) -> bool:
        """Was all of an ended run delivered before, as far as the outbox knows?"""
        return (
            self._outbox.target == self._target_text
            and attempt.outcome is not None
            and self._outbox.status == _status(attempt, _ENDINGS[attempt.outcome])
            and not self.waiting()
        )

    def waiting(self) -> Waiting:
        """What is left, but for artifacts that the server refused or that are gone from here."""
        found = waiting(self._run, self._journal, self._outbox.view(), self._target.upload)
        return Waiting(found.points, tuple(path for path in found.artifacts if path not in self._skipped))

    # -- values: parameters, tags, metrics ---------------------------------------------------------------

    def deliver(self, attempt: Attempt) -> bool:
        """Deliver some of what the journal has; should it be called again at once?

        `attempt` is the run's newest.
        """
        if self._remote is None:
            self._open(attempt)
            return True
        if attempt.outcome is None and self._outbox.status != _status(attempt, "running"):
            if not self._remote.owned:
                self._at_server.running()
            self._outbox.note(status=_status(attempt, "running"))
        if self._outbox.params_sent < attempt.attempt:
            self._send_params()
        self._send_tags(attempt)
        return self._send_points()

    @property
    def _at_server(self) -> Delivery:
        assert self._delivery is not None, "opened first"
        return self._delivery

    def _open(self, attempt: Attempt) -> None:
        if self._delivery is None:
            self._delivery = open_delivery(self._target)
        known = self._outbox.remote_run_id if self._outbox.place == self._target.place else None
        first, info = self._journal.attempts()[0], self._journal.run_info()
        identity = Identity(info.id, info.name, first.started_ns, _source(first.command), _user())
        try:
            remote = self._delivery.open(identity, known)
        except Refused as error:
            raise Closed(str(error)) from error
        self._outbox.begin(self._target.place, self._target_text, remote, attempt.attempt)
        self._uncertain = self._outbox.flight() is not None
        self._remote = remote
        self._notice(f"delivering {info.id} to {remote.url or self._target.place}, run {remote.run_id}")

    def _send_params(self) -> None:
        """Parameters are the first attempt's; what later ones changed becomes their tags."""
        attempts = self._journal.attempts()
        first = _flat(attempts[0].params)
        if not self._outbox.params_sent:
            for notice in self._at_server.params(first):
                self._notice(notice)
        for later in attempts[1:]:
            changed = {key: value for key, value in _flat(later.params).items() if first.get(key) != value}
            self._set_tags(
                {f"interlock.attempt.{later.attempt}.{key}": value for key, value in changed.items()}
            )
        self._outbox.note(params_sent=attempts[-1].attempt)

    def _send_tags(self, attempt: Attempt) -> None:
        newest = attempt.end_state
        if attempt.outcome is None:
            if time.monotonic() < self._next_tags:
                return
            self._next_tags = time.monotonic() + _TAGS_EVERY_S
            moved = self._journal.last_transition()
            newest = moved.dest if moved else None
        tags = {
            "interlock.attempt": str(attempt.attempt),
            "interlock.host": attempt.host,
            "interlock.outcome": attempt.outcome or "running",
            "interlock.reason": attempt.reason,
            "interlock.exception": attempt.exception,
            **self._parent_tags(),
            **self._checkpoint_tags(),
        }
        if newest is not None:
            tags["interlock.state"] = newest.value
        self._set_tags(tags)

    def _parent_tags(self) -> dict[str, str]:
        """The run that this one comes from, and that run's id at the server once it is known here."""
        parent = self._journal.run_info().parent
        if parent is None:
            return {}
        tags = {"interlock.parent": parent.run, "interlock.parent_kind": parent.kind}
        if parent.seq is not None:
            tags["interlock.parent_seq"] = str(parent.seq)
        there = self._outbox.sent_tags.get(self._at_server.parent_tag) or self._parent_there(parent)
        if there and self._at_server.parent_tag and self._remote and not self._remote.owned:
            tags[self._at_server.parent_tag] = there
        return tags

    def _parent_there(self, parent: Parent) -> str | None:
        folder = folder_of_parent(self._run, parent)
        if folder is None:
            return None
        try:
            sent = read_outbox(folder.outbox)
        except OutboxError:
            return None
        return sent.remote_run_id if sent.place == self._target.place else None

    def _checkpoint_tags(self) -> dict[str, str]:
        """Which uploaded checkpoints are the newest and the best."""
        rows = self._journal.checkpoints(include_removed=True)
        here = [row for row in rows if f"{CHECKPOINTS}/{row.name}" in self._outbox.artifacts]
        best = [row for row in here if row.best]
        named = {"last": here[-1:], "best": best[-1:]}
        return {f"interlock.checkpoint.{which}": row[0].name for which, row in named.items() if row}

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        # A tag that was never set and is empty now needs no setting.
        changed = {key: value for key, value in tags.items() if self._outbox.sent_tags.get(key, "") != value}
        if not changed:
            return
        try:
            self._at_server.tags(changed)
        except Refused as error:
            self._at_server.check()
            if len(changed) > 1:
                for key, value in changed.items():
                    self._set_tags({key: value})
                return
            self._notice(f"tag {next(iter(changed))}: {error}")
        self._outbox.tags_sent(changed)

    def _send_points(self) -> bool:
        flight = self._outbox.flight()
        if flight is None:
            rows = self._journal.metrics(after=self._outbox.cursor, limit=self._at_server.most_points)
            flight = select(rows, self._outbox.marks, self._name)
            if flight is None:
                return False
            if flight.points:
                self._outbox.depart(flight)
        refused = self._send_flight(flight)
        self._outbox.arrived(flight, refused)
        return True

    def _send_flight(self, flight: Flight) -> int:
        """Send it, again if need be; how many of its points the server will never take."""
        points = sorted(flight.points, key=lambda point: (point.key, point.step, point.time_ms))
        if self._uncertain:
            points = self._at_server.missing(points)
        self._uncertain = True
        refused = self._send_some(points)
        self._uncertain = False
        return refused

    def _send_some(self, points: list[Point]) -> int:
        if not points:
            return 0
        try:
            self._at_server.points(points)
        except Refused as error:
            self._at_server.check()
            if len(points) > 1:
                middle = len(points) // 2
                return self._send_some(points[:middle]) + self._send_some(points[middle:])
            if points[0].key not in self._refused:
                self._refused.add(points[0].key)
                self._notice(f"metric {points[0].key}: {error} (said once; its values are in the journal)")
            return 1
        return 0

    def _name(self, name: str) -> str:
        """What the server calls a metric."""
        if name not in self._names:
            self._names[name] = self._at_server.key(name)
            if self._names[name] != name:
                self._notice(f"metric {name!r} is shown as {self._names[name]!r}")
        return self._names[name]

    # -- artifacts ------------------------------------------------------------------------------------------

    def upload(self, attempt: Attempt) -> bool:
        """Upload one file, or remove one checkpoint that is neither best nor last any more; was there one?"""
        if self._job is None:
            self._job = self._next_job(attempt)
        job = self._job
        if job is None:
            return self._prune()
        if job.maker is not None and not self._made(job, job.maker):
            return True
        if job.path == MODEL:
            self._deliver_model(job)
            return True
        if not job.files:
            self._finish(job)
            return True
        file, folder = job.files[0]
        try:
            self._at_server.artifact(file, folder)
        except Refused as error:
            self._at_server.check()
            self._refuse(job, file, error)
            return True
        job.files.pop(0)
        if job.path == _REPORTS:
            self._outbox.artifact_sent(file.name, file.stat().st_size)
        return True

    def _refuse(self, job: "_Job", file: Path, error: Refused) -> None:
        """A report is refused alone, of a checkpoint all."""
        name = file.name if job.path == _REPORTS else job.path
        self._notice(f"artifact {name}: {error}")
        self._skipped.add(name)
        if job.path == _REPORTS:
            job.files.pop(0)
        else:
            self._drop()

    def _next_job(self, attempt: Attempt) -> "_Job | None":
        over, now = attempt.outcome is not None, time.monotonic()
        if self._outbox.reports_sent < attempt.attempt and (over or now >= self._next_reports):
            return self._reports_job(attempt.attempt if over else 0)
        if not self._round and (over or now >= self._next_round):
            self._round = self._missing_checkpoints()
            self._round_began = now
        while self._round:
            job = self._checkpoint_job(self._round.pop(0))
            if job is not None:
                return job
        if over and self._run.final_model.exists() and MODEL not in self._skipped:
            return self._model_job(attempt)
        return None

    def _missing_checkpoints(self) -> list[str]:
        rows = wanted_checkpoints(self._journal.checkpoints(), self._target.upload)
        known = self._outbox.artifacts.keys() | self._skipped
        return [row.name for row in rows if f"{CHECKPOINTS}/{row.name}" not in known]

    def _reports_job(self, attempt: int) -> "_Job":
        """All reports, made anew; `attempt` has ended; 0: none has."""
        began, stage = time.monotonic(), self._stage()
        maker = OneOff("tracking.artifacts", str(self._run.path), str(stage), output=stage / _FAILURES)
        return _Job(_REPORTS, [], 0, attempt, began, maker)

    def _made(self, job: "_Job", maker: OneOff) -> bool:
        """Have the reports been made? What could not be is said once."""
        status = maker.wait(_GLANCE_S)
        if status is None:
            return False
        job.maker, stage = None, self._stage()
        if job.path == MODEL:
            return True
        failures = _json_of(stage / _FAILURES)
        for name in REPORTS:
            if (stage / name).is_file():
                job.files.append((stage / name, ""))
            elif name not in self._told:
                self._told.add(name)
                reason = failures.get(name, f"the process that makes it ended with status {status}")
                self._notice(f"artifact {name}: cannot be made ({reason})")
        return True

    def _model_job(self, attempt: Attempt) -> "_Job":
        """The final model, exported if that was not done before; the run's status does not wait for it."""
        self.conclude(attempt)
        folder, maker = self._run.final_model, None
        request = _json_of(folder / "request.json")
        if not (folder / "mlflow").exists() and not request.get("reason", True):
            maker = OneOff(
                request["module"], str(folder), output=folder / _EXPORTED, limit_s=_LONGEST_EXPORT_S
            )
        return _Job(MODEL, [], 0, attempt.attempt, time.monotonic(), maker)

    def _deliver_model(self, job: "_Job") -> None:
        """In the format that it could be exported to, else its weights, with the reason."""
        folder = self._run.final_model
        request, exported = _json_of(folder / "request.json"), (folder / "mlflow").exists()
        reason = request.get("reason") or _json_of(folder / _EXPORTED).get("reason")
        tags = {
            "interlock.model": f"{self._run.id}/{request.get('attempt')}",
            "interlock.run_id": self._run.id,
            "interlock.format": "pt2" if exported else "safetensors",
        }
        if not exported:
            tags["interlock.reason"] = reason or "the process that exports it did not finish"
            self._notice(f"the final model is delivered as its weights: {tags['interlock.reason']}")
        files = folder / ("mlflow" if exported else "weights")
        delivery = self._at_server
        if not isinstance(delivery, ModelDelivery):
            self._notice("the final model: this backend takes no models")
            shutil.rmtree(folder, ignore_errors=True)
            self._drop()
            return
        try:
            delivery.model(files, tags, request.get("batches", 0))
        except Refused as error:
            self._at_server.check()
            self._notice(f"the final model: {error}")
            self._skipped.add(MODEL)
            self._drop()
            return
        self._outbox.artifact_sent(MODEL, sum(file.stat().st_size for file in files.rglob("*")))
        shutil.rmtree(folder, ignore_errors=True)
        self._drop()

    def _checkpoint_job(self, name: str) -> "_Job | None":
        path = f"{CHECKPOINTS}/{name}"
        stage = self._stage() / name
        try:
            _pin(self._run.checkpoints / name, stage)
        except FileNotFoundError:
            # Retention was quicker; or a person was: then no row of the journal will ever say so.
            self._skipped.add(path)
            self._drop()
            return None
        files = sorted((file for file in stage.rglob("*") if file.is_file()), key=_manifest_last)
        places = [(file, (path / file.relative_to(stage).parent).as_posix()) for file in files]
        return _Job(path, places, sum(file.stat().st_size for file in files), 0, time.monotonic())

    def _finish(self, job: "_Job") -> None:
        now = time.monotonic()
        if job.path == _REPORTS:
            if job.attempt:
                self._outbox.note(reports_sent=job.attempt)
            self._next_reports = now + max(_REPORTS_EVERY_S, _MOST_OF_THE_TIME * (now - job.began))
            self._drop()
            return
        if not self._round:
            self._next_round = now + max(_ROUND_EVERY_S, _MOST_OF_THE_TIME * (now - self._round_began))
        self._outbox.artifact_sent(job.path, job.size_bytes)
        self._next_tags = 0.0  # which checkpoints are the best and the last is said at once
        self._drop()

    def _drop(self) -> None:
        shutil.rmtree(self._run.path / _STAGE, ignore_errors=True)
        self._job = None

    def _prune(self) -> bool:
        """Remove an uploaded checkpoint that is neither best nor last, once those are there, and said to be."""
        if self._target.upload != "best+last":
            return False
        tags = self._checkpoint_tags()
        keep = {f"{CHECKPOINTS}/{name}" for name in tags.values()}
        surplus = sorted(path for path in self._outbox.artifacts if path.startswith(f"{CHECKPOINTS}/"))
        surplus = [path for path in surplus if path not in keep]
        if not surplus or any(self._outbox.sent_tags.get(key) != value for key, value in tags.items()):
            return False
        self._at_server.remove_artifacts(surplus[0])
        self._outbox.artifact_removed(surplus[0])
        return True

    def _stage(self) -> Path:
        """Where files wait for their upload, safe from retention."""
        stage = self._run.path / _STAGE
        stage.mkdir(exist_ok=True)
        return stage

    # -- the end ------------------------------------------------------------------------------------------

    def conclude(self, attempt: Attempt) -> bool:
        """Everything has been delivered: say how the run ended. A user's run is left to its owner."""
        assert attempt.outcome is not None
        assert self._remote is not None
        ending = _ENDINGS[attempt.outcome]
        if not self._remote.owned and self._outbox.status != _status(attempt, ending):
            self._at_server.end(ending, (attempt.ended_ns or time.time_ns()) // 1_000_000)
        self._outbox.note(status=_status(attempt, ending), trouble="")
        return True


@dataclass
class _Job:
    """Files on their way, those that are left, each with its folder at the server.

    `path` is what they are together. For reports, `attempt` is the one whose end is in them (0: none), and `maker`
    the process that makes them, None when it is done.
    """

    path: str
    files: list[tuple[Path, str]]
    size_bytes: int
    attempt: int
    began: float
    maker: OneOff | None = None


def _pin(folder: Path, stage: Path) -> None:
    """Link `folder`'s files into `stage`, whence retention cannot take them; copy where links are impossible.

    Raises FileNotFoundError if it goes away meanwhile.
    """
    shutil.copytree(folder, stage, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _json_of(file: Path) -> dict[str, Any]:
    """What the file holds; {} where it is missing or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _manifest_last(file: Path) -> tuple[bool, str]:
    """A checkpoint without its manifest is none: until it is whole, it cannot be taken for one."""
    return file.name == "manifest.json", str(file)


def _status(attempt: Attempt, status: str) -> str:
    return f"{attempt.attempt}:{status}"


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{'data': {'seed': 1}} becomes {'data.seed': '1'}."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _source(command: Any) -> str:
    """The script of a recorded command; the arguments may hold secrets, and stay here."""
    words = command.get("argv", []) if isinstance(command, dict) else command
    words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    return next((word for word in words if word.endswith((".py", ".ipynb"))), words[0] if words else "")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
