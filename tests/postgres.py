"""A PostgreSQL cluster of a test's own, from Debian's packages, and a look into MLflow's tables in it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow_server import Database, RemoteRun, free_port

__all__ = ["PostgresCluster", "PostgresDatabase", "find_binaries"]


def find_binaries() -> Path | None:
    """The folder with `initdb` and `postgres`; Debian does not put it into PATH."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)
    needed = ("initdb", "postgres", "pg_isready")
    return next((folder for folder in found if all((folder / name).exists() for name in needed)), None)


class PostgresCluster:
    """Listens on the loopback interface; its files are in a temporary folder. Never run as root, which it refuses."""

    def __init__(self, binaries: Path):
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="interlock-postgres-"))
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._user: int | None = None
        if os.getuid() == 0:
            self._user = next(
                user.pw_uid for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody")
            )
            os.chown(self._folder, self._user, -1)
        self._call("initdb", "-D", f"{self._folder}/data", "-U", "postgres", "-A", "trust", "--no-sync")
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        command = ["postgres", "-D", f"{self._folder}/data", "-p", str(self._port), "-k", str(self._folder)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / command[0]), *command[1:]],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                user=self._user,
            )
        deadline = time.monotonic() + 60
        while subprocess.run(
            [self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        ).returncode:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as in a crash: clients are cut off, and the next start recovers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(60)
            self._process = None

    def _call(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / name), *arguments],
            user=self._user, cwd=self._folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def __enter__(self) -> "PostgresCluster":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


class PostgresDatabase(Database):
    """What an MLflow store in PostgreSQL holds."""

    def __init__(self, uri: str):
        object.__setattr__(self, "path", Path("nowhere"))
        object.__setattr__(self, "_uri", uri.replace("+psycopg2", ""))

    def runs(self, ours: str) -> list[RemoteRun]:
        import psycopg2

        connection = psycopg2.connect(self._uri)
        try:
            return self._runs(_Execute(connection), ours)
        finally:
            connection.close()


class _Execute:
    """A connection that is asked as SQLite's is."""

    def __init__(self, connection: Any):
        self._cursor = connection.cursor()

    def execute(self, sql: str, arguments: Sequence[object]) -> "_Execute":
        self._cursor.execute(sql.replace("%", "%%").replace("?", "%s"), tuple(arguments))
        return self

    def fetchall(self) -> list[Any]:
        return list(self._cursor.fetchall())

    def __iter__(self) -> Any:
        return iter(self._cursor.fetchall())
