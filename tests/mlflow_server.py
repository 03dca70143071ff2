"""A real MLflow server on the loopback interface, to be stopped and started, and a look into its database."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

__all__ = ["Database", "MLflowServer", "RemoteRun", "free_port"]


class MLflowServer:
    """`mlflow server` with SQLite and served artifacts in `folder`; the port stays the same over restarts.

    `store` is the URI of another database.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        store: str = "",
    ):
        self.folder = folder
        self._options, self._environment = list(options), dict(environment or {})
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = Database(folder / "mlflow.db")
        self._store = store or f"sqlite:///{self.database.path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait_s: float = 180.0) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self._store, *self._options]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env=os.environ | quiet | self._environment,
            )
        deadline = time.monotonic() + wait_s
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(
                    "the MLflow server did not start", (self.folder / "server.log").read_text()
                )
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """With all its workers, at once: what was being served is cut off."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> "MLflowServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@dataclass(frozen=True)
class RemoteRun:
    """A run as MLflow's database has it. `points` are (key, step, value, timestamp in ms); NaN is None.

    `system` are those of `system/*`, which the journal does not have.
    """

    id: str
    stage: str
    name: str
    status: str
    end_ms: int | None
    experiment: str
    artifacts: Path
    tags: dict[str, str]
    params: dict[str, str]
    points: list[tuple[str, int, float | None, int]]
    system: list[tuple[str, int, float | None, int]]


@dataclass(frozen=True)
class Database:
    """The SQLite file of an MLflow store: what it holds, without asking MLflow."""

    path: Path

    template: ClassVar[Path]
    """A store that MLflow has made, with nothing in it: to be copied, since making one takes it some seconds."""

    @classmethod
    def made(cls, path: Path, artifacts: str = "") -> "Database":
        """A plain SQLite store with its tables; `artifacts` are those of its default experiment, default: beside it."""
        made = cls(path)
        with (cls.template.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not cls.template.exists():
                script = "import sys; from mlflow import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()"
                making = cls(cls.template.with_suffix(".making"))
                subprocess.run([sys.executable, "-c", script, making.uri], cwd=path.parent, check=True)
                making.path.rename(cls.template)
        shutil.copyfile(cls.template, path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            place = artifacts or str(path.parent / "mlruns" / "0")
            connection.execute("UPDATE experiments SET artifact_location = ?", (place,))
        return made

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.path}"

    def runs(self, ours: str) -> list[RemoteRun]:
        """All runs that carry the tag of our run `ours`, deleted ones included."""
        if not self.path.exists():
            return []
        connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=20)
        try:
            return self._runs(connection, ours)
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return []  # it is being made
        finally:
            connection.close()

    def run(self, ours: str) -> RemoteRun:
        """The only run that carries our tag and is not deleted."""
        (found,) = (run for run in self.runs(ours) if run.stage == "active")
        return found

    @staticmethod
    def _runs(connection: sqlite3.Connection, ours: str) -> list[RemoteRun]:
        found = connection.execute(
            """SELECT run_uuid, runs.lifecycle_stage, runs.name, status, end_time, experiments.name, artifact_uri
               FROM runs JOIN experiments USING (experiment_id) WHERE run_uuid IN
                   (SELECT run_uuid FROM tags WHERE key = 'interlock.run_id' AND value = ?)""",
            (ours,),
        ).fetchall()
        points = """SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END, timestamp
                    FROM metrics WHERE run_uuid = ? AND key {} LIKE 'system/%' ORDER BY key, step, timestamp"""
        return [
            RemoteRun(
                *row[:6],
                artifacts=Path(row[6]),
                tags=dict(connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", row[:1])),
                params=dict(connection.execute("SELECT key, value FROM params WHERE run_uuid = ?", row[:1])),
                points=connection.execute(points.format("NOT"), row[:1]).fetchall(),
                system=connection.execute(points.format(""), row[:1]).fetchall(),
            )
            for row in found
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
