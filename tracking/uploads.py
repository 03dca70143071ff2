"""What of a run is uploaded as files, one at a time: checkpoints, the user's own, reports, journal, final model."""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from states.table import State
from tracking.artifacts import REPORTS
from tracking.delivery import CHECKPOINTS, Delivery, ModelDelivery, Refused, Unavailable, Upload
from tracking.fetching import fetched
from tracking.journal import Attempt, Checkpoint, Journal
from tracking.journal_copy import JOURNAL, write_journal_copy
from tracking.masking import mask_text
from tracking.one_off import OneOff
from tracking.outbox import Outbox, OutboxView
from tracking.own_artifacts import version, waiting_own
from tracking.runs import RunFolder
from tracking.schema import JournalError

__all__ = ["MODEL", "Uploads", "waiting_artifacts", "wanted_checkpoints"]

MODEL = "model"
"""The final model's name at the server."""

_STAGE = "uploading"
_REPORTS = "reports"
_OWN = "own"
_FAILURES = "failures.json"
_EXPORTED = "exported.json"
_ROUND_EVERY_S = 15.0
_OWN_EVERY_S = 5.0
_REPORTS_EVERY_S = 60.0
_LONGEST_EXPORT_S = 1800.0
_GLANCE_S = 0.2  # how long to wait at a time for a process that makes something
_MOST_OF_THE_TIME = 4  # while a run trains, uploads of one kind take at most a fifth of it
_OF_A_PROCESSOR = 400
"""Making reports, which takes the longer the longer the run is, takes such a part of a processor while it trains."""


def wanted_checkpoints(rows: list[Checkpoint], upload: Upload) -> list[Checkpoint]:
    """Which of a run's checkpoints (oldest first) belong at the server; the most urgent first."""
    if upload == "none":
        return []
    newest_first = rows[::-1]
    if upload == "all":
        return newest_first
    wanted = newest_first[:1]
    if wanted and wanted[0].state is State.DONE:
        # Nothing goes on from there: a longer training begins with the one before.
        wanted += [row for row in newest_first if row.state is not State.DONE][:1]
    best = [row for row in newest_first if row.best][:1]
    return wanted + [row for row in best if row not in wanted]


def waiting_artifacts(run: RunFolder, journal: Journal, sent: OutboxView, upload: Upload) -> Iterator[str]:
    """The paths at the server of what is still to be uploaded; reads the journal only."""
    for row in wanted_checkpoints(journal.checkpoints(), upload):
        if f"{CHECKPOINTS}/{row.name}" not in sent.artifacts:
            yield f"{CHECKPOINTS}/{row.name}"
    attempts = journal.attempts()
    if attempts and attempts[-1].outcome and sent.reports_sent < attempts[-1].attempt:
        yield from REPORTS
    yield from waiting_own(run, sent.versions)
    if run.final_model.exists():
        yield MODEL


@dataclass
class _Job:
    """Files on their way, those that are left, each with its folder at the server.

    `path` is what they are together; of reports and of the user's own each is one by itself. For reports, `attempt` is
    the one whose end is in them (0: none), and `maker` the process that makes them, None when it is done; `children_s`
    is the processor time of those before.
    """

    path: str
    files: list[tuple[Path, str]]
    size_bytes: int
    attempt: int
    began: float
    maker: OneOff | None = None
    children_s: float = 0.0

    @property
    def apart(self) -> bool:
        """Is each of the files an artifact by itself?"""
        return self.path in (_REPORTS, _OWN)

    def name(self, file: Path, folder: str) -> str:
        """What `file` is called at the server."""
        return f"{folder}/{file.name}" if folder else file.name


class Uploads:
    """One run's files on their way to one server, in the background of its values.

    Every method may be interrupted at any point. Those that speak to the server raise Unavailable, with nothing lost or
    done twice when they are called again. `before_model` is called before a final model is dealt with, which may take
    long: it says how the run ended.
    """

    def __init__(
        self,
        run: RunFolder,
        upload: Upload,
        outbox: Outbox,
        journal: Journal,
        notice: Callable[[str], None],
        secrets: Collection[str],
        before_model: Callable[[Attempt], object],
        *,
        at_once: bool,
    ):
        self._run, self._upload, self._outbox, self._journal = run, upload, outbox, journal
        self._notice, self._secrets, self._before_model = notice, secrets, before_model
        self.skipped: set[str] = set()
        """What the server has refused, or is gone from here."""
        self.news = False
        """Whether other checkpoints are there than were told of last; set by `step`, cleared by who tells."""
        self._told: set[str] = set()
        self._job: _Job | None = None
        self._at_once = at_once
        wait = 0.0 if at_once else 1.0
        self._next_round = time.monotonic() + wait * _ROUND_EVERY_S
        # The next machine is to know of the attempts of one that a run was brought to, however short they are.
        self._next_reports = time.monotonic() + wait * _REPORTS_EVERY_S * (fetched(run) is None)
        self._next_own = 0.0
        self._journal_upto = -1
        self._drop()

    def step(self, server: Delivery, attempt: Attempt) -> bool:
        """Upload one file, or remove one checkpoint that is neither best nor last any more; was there one?

        Where something is still being made, False while the run trains: there is time until the next call.
        """
        if self._job is None:
            self._job = self._next_job(attempt)
        job = self._job
        if job is None:
            return self._prune(server)
        if job.maker is not None and not self._made(job, job.maker):
            return self._at_once or attempt.outcome is not None
        if job.path == MODEL:
            self._deliver_model(server, job)
            return True
        if not job.files:
            self._finish(job)
            return True
        file, folder = job.files[0]
        try:
            server.artifact(file, folder)
        except Refused as error:
            server.check()
            self._refuse(job, job.name(file, folder) if job.apart else job.path, error)
            return True
        job.files.pop(0)
        if job.apart:
            sent = version(file) if job.path == _OWN else ""
            self._outbox.artifact_sent(job.name(file, folder), file.stat().st_size, sent)
        return True

    def checkpoint_tags(self) -> dict[str, str]:
        """Which uploaded checkpoints are the newest and the best."""
        rows = self._journal.checkpoints(include_removed=True)
        here = [row for row in rows if f"{CHECKPOINTS}/{row.name}" in self._outbox.artifacts]
        best = [row for row in here if row.best]
        named = {"last": here[-1:], "best": best[-1:]}
        return {f"interlock.checkpoint.{which}": row[0].name for which, row in named.items() if row}

    def _refuse(self, job: _Job, name: str, error: Refused) -> None:
        """A report is refused alone, of a checkpoint all."""
        self._notice(f"artifact {name}: {error}")
        self.skipped.add(name)
        if job.apart:
            job.files.pop(0)
        else:
            self._drop()

    def _next_job(self, attempt: Attempt) -> _Job | None:
        over, now = attempt.outcome is not None, time.monotonic()
        if over or now >= self._next_own:
            own = self._own_job()
            if own is not None:
                return own
            self._next_own = now + _OWN_EVERY_S
        if self._outbox.reports_sent < attempt.attempt and (over or now >= self._next_reports):
            return self._reports_job(attempt.attempt if over else 0)
        if over or now >= self._next_round:
            for row in self._missing_checkpoints():  # looked up each time: the newest comes first
                job = self._checkpoint_job(row)
                if job is not None:
                    return job
            self._next_round = now + _ROUND_EVERY_S
        if over and self._run.final_model.exists() and MODEL not in self.skipped:
            return self._model_job(attempt)
        return None

    def _finish(self, job: _Job) -> None:
        now = time.monotonic()
        pause = _MOST_OF_THE_TIME * (now - job.began)
        if job.path == _REPORTS:
            if job.attempt:
                self._outbox.note(reports_sent=job.attempt)
            made_s = _children_s() - job.children_s
            self._next_reports = now + max(_REPORTS_EVERY_S, pause, _OF_A_PROCESSOR * made_s)
        elif job.path == _OWN:
            self._next_own = now + max(_OWN_EVERY_S, pause)
        else:
            self._next_round = now + pause
            self._outbox.artifact_sent(job.path, job.size_bytes)
            self.news = True
        self._drop()

    def _drop(self) -> None:
        shutil.rmtree(self._run.path / _STAGE, ignore_errors=True)
        self._job = None

    def _stage(self) -> Path:
        """Where files wait for their upload, safe from retention."""
        stage = self._run.path / _STAGE
        stage.mkdir(exist_ok=True)
        return stage

    # -- checkpoints, with the journal that another machine needs beside them -------------------------------

    def _missing_checkpoints(self) -> list[Checkpoint]:
        rows = wanted_checkpoints(self._journal.checkpoints(), self._upload)
        known = self._outbox.artifacts.keys() | self.skipped
        return [row for row in rows if f"{CHECKPOINTS}/{row.name}" not in known]

    def _checkpoint_job(self, row: Checkpoint) -> _Job | None:
        path = f"{CHECKPOINTS}/{row.name}"
        stage = self._stage() / row.name
        began = time.monotonic()
        try:
            _pin(self._run.checkpoints / row.name, stage)
        except FileNotFoundError:
            # Retention was quicker; or a person was: then no row of the journal will ever say so.
            self.skipped.add(path)
            self._drop()
            return None
        files = sorted((file for file in stage.rglob("*") if file.is_file()), key=_manifest_last)
        places = [(file, (path / file.relative_to(stage).parent).as_posix()) for file in files]
        if row.seq > self._journal_upto:
            places.insert(-1, (self._journal_copy(), ""))  # a checkpoint that is whole can be gone on from
        return _Job(path, places, sum(file.stat().st_size for file in files), 0, began)

    def _journal_copy(self) -> Path:
        file = self._stage() / JOURNAL
        try:
            self._journal_upto = write_journal_copy(self._run, file, self._secrets)
        except JournalError as error:  # a full disk, perhaps: there is another time
            raise Unavailable(str(error)) from error
        return file

    def _prune(self, server: Delivery) -> bool:
        """Remove an uploaded checkpoint that is neither best nor last, once those are there, and said to be."""
        if self._upload != "best+last":
            return False
        tags = self.checkpoint_tags()
        wanted = wanted_checkpoints(self._journal.checkpoints(), self._upload)
        keep = {f"{CHECKPOINTS}/{name}" for name in (*tags.values(), *(row.name for row in wanted))}
        surplus = sorted(path for path in self._outbox.artifacts if path.startswith(f"{CHECKPOINTS}/"))
        surplus = [path for path in surplus if path not in keep]
        if not surplus or any(self._outbox.sent_tags.get(key) != value for key, value in tags.items()):
            return False
        server.remove_artifacts(surplus[0])
        self._outbox.artifact_removed(surplus[0])
        return True

    # -- the user's own -------------------------------------------------------------------------------------

    def _own_job(self) -> _Job | None:
        began, files = time.monotonic(), []
        for path in waiting_own(self._run, self._outbox.versions):
            if path in self.skipped:
                continue
            file = self._stage() / path
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                _link(str(self._run.artifacts / path), str(file))
            except FileNotFoundError:  # a person has removed it
                continue
            files.append((file, path.rpartition("/")[0]))
        return _Job(_OWN, files, 0, 0, began) if files else None

    # -- reports --------------------------------------------------------------------------------------------

    def _reports_job(self, attempt: int) -> _Job:
        """All reports, made anew; `attempt` has ended; 0: none has."""
        began, spent, stage = time.monotonic(), _children_s(), self._stage()
        maker = OneOff("tracking.artifacts", str(self._run.path), str(stage), output=stage / _FAILURES)
        return _Job(_REPORTS, [], 0, attempt, began, maker, spent)

    def _made(self, job: _Job, maker: OneOff) -> bool:
        """Has it been made? What of the reports could not be is said once."""
        status = maker.wait(_GLANCE_S)
        if status is None:
            return False
        stage = self._stage()
        if job.path == _REPORTS:
            failures = _json_of(stage / _FAILURES)
            for name in REPORTS:
                if (stage / name).is_file():
                    job.files.append((stage / name, ""))
                elif name not in self._told:
                    self._told.add(name)
                    reason = failures.get(name, f"the process that makes it ended with status {status}")
                    self._notice(f"artifact {name}: cannot be made ({reason})")
        job.maker = None
        return True

    # -- the final model ------------------------------------------------------------------------------------

    def _model_job(self, attempt: Attempt) -> _Job:
        """The final model, exported if that was not done before; the run's status does not wait for it."""
        self._before_model(attempt)
        folder, maker = self._run.final_model, None
        request = _json_of(folder / "request.json")
        if not (folder / "mlflow").exists() and not request.get("reason", True):
            maker = OneOff(
                request["module"], str(folder), output=folder / _EXPORTED, limit_s=_LONGEST_EXPORT_S
            )
        return _Job(MODEL, [], 0, attempt.attempt, time.monotonic(), maker)

    def _deliver_model(self, server: Delivery, job: _Job) -> None:
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
            reason = reason or "the process that exports it did not finish"
            tags["interlock.reason"] = mask_text(reason, self._secrets)
            self._notice(f"the final model is delivered as its weights: {tags['interlock.reason']}")
        files = folder / ("mlflow" if exported else "weights")
        if not isinstance(server, ModelDelivery):
            self._notice("the final model: this backend takes no models")
            shutil.rmtree(folder, ignore_errors=True)
            self._drop()
            return
        try:
            server.model(files, tags, request.get("batches", 0))
        except Refused as error:
            server.check()
            self._notice(f"the final model: {error}")
            self.skipped.add(MODEL)
            self._drop()
            return
        self._outbox.artifact_sent(MODEL, sum(file.stat().st_size for file in files.rglob("*")))
        shutil.rmtree(folder, ignore_errors=True)
        self._drop()


def _children_s() -> float:
    """The processor time of processes that this one had and that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


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
