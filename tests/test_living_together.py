"""Beside what a user has already: a run begun by the user, servers with passwords, servers of an older MLflow."""

import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from deliveries import BATCHES, Training, assert_once, train_in_child, until
from mlflow_server import Database, MLflowServer
from orchestrator.retrieval import retrieve
from tracking.delivery import TrackerError
from tracking.fetching import FetchError
from tracking.mlflow_delivery import MLflow
from tracking.runs import RunFolder, create_run
from tracking.shipper import start_shipper, status, sync

OLDER = os.environ.get("MLFLOW2_PYTHON", "")
"""The interpreter of an environment with mlflow 2.x, whose server is to be tried."""


class OtherServer(MLflowServer):
    """`mlflow server` with another interpreter, more arguments, and variables of its own."""

    def __init__(self, folder: Path, python: str, *more: str, **environment: str):
        super().__init__(folder)
        self._command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--workers", "1", "--backend-store-uri", self.database.uri, *more]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
        self._environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        self._environment.pop("PYTHONPATH", None)

    def start(self, wait_s: float = 120.0) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
                cwd=self.folder,
            )
        deadline = time.monotonic() + wait_s
        while not self.answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.2)


@pytest.mark.long
def test_inside_a_run_of_the_users(run: RunFolder, own_store: Database, tmp_path: Path) -> None:
    """`with mlflow.start_run():` around the training: that run is used, and left open; or it gets one below."""
    fold = create_run(tmp_path, "fold")
    body = f"""
import mlflow
mlflow.set_tracking_uri({own_store.uri!r})
mlflow.set_experiment("mine")
with mlflow.start_run(run_name="by hand") as mine:
    mlflow.log_param("theirs", 1)
    training = Training(run)
    shipper = start_shipper(run, MLflow())
    for _ in range(BATCHES):
        training.batch()
    training.end("done", "finished")
    assert shipper.wait(120) == 0
    mlflow.log_metric("after", 1.0)
    assert mlflow.get_run(mine.info.run_id).info.status == "RUNNING", "left open for its owner"
    run = RunFolder(pathlib.Path({str(fold.path)!r}))
    training = Training(run)
    shipper = start_shipper(run, MLflow(nested=True))
    training.batch()
    training.end("done", "finished")
    assert shipper.wait(120) == 0
"""
    assert train_in_child(run, body).wait(200) == 0, (run.path / "shipper.log").read_text()
    remote = own_store.run(run.id)
    assert (remote.name, remote.experiment, remote.status) == ("by hand", "mine", "FINISHED")
    assert remote.params == {"theirs": "1", "lr": "0.1"}
    assert remote.tags["interlock.owner"] == "user"
    assert [step for key, step, *_ in remote.points if key == "batch/loss"] == list(range(1, BATCHES + 1))
    below = own_store.run(fold.id)
    assert (below.name, below.experiment, below.status) == ("fold", "mine", "FINISHED")
    assert below.tags["mlflow.parentRunId"] == remote.id
    assert "interlock.owner" not in below.tags
    assert_once(fold, below)


def test_there_must_be_a_run_to_nest_in(run: RunFolder, store: Database) -> None:
    with pytest.raises(TrackerError, match="found no run to nest in; expected an active one"):
        MLflow(store.uri, nested=True).destination()
    assert MLflow(store.uri, run_id="abc", nested=True).destination().settings["parent_run_id"] == "abc"
    training = Training(run)
    training.batch()
    training.end()
    report = sync(run, tracker=MLflow(store.uri, run_id="abc", nested=True))
    assert not report.complete
    assert "there is no MLflow run 'abc'; expected the run that nested=True is to nest in" in report.trouble


@pytest.mark.long
def test_system_metrics(run: RunFolder, tmp_path: Path) -> None:
    database = Database(tmp_path / "mlflow.db")
    training = Training(run)
    shipper = start_shipper(run, MLflow(database.uri))
    training.batch()
    until(lambda: any(found.system for found in database.runs(run.id)), 120)
    training.end()
    assert shipper is not None
    assert shipper.wait(120) == 0, (run.path / "shipper.log").read_text()
    points = [(key, step) for key, step, *_ in database.run(run.id).system]
    assert len(points) == len(set(points))
    keys = {key for key, _ in points}
    assert {"system/cpu_utilization_percentage", "system/process_memory_megabytes"} <= keys
    values = {key: value for key, _, value, _ in database.run(run.id).system}
    assert values["system/cpu_utilization_percentage"] > 0, "of the time since the last look"


@pytest.mark.parametrize(
    ("argument", "variable", "wanted"),
    [
        (None, None, True),
        (None, "false", False),
        (None, "true", True),
        (True, "false", True),
        (False, "true", False),
    ],
)
def test_whether_system_metrics_are_wanted(
    argument: bool | None, variable: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", variable)
    settings = MLflow("sqlite:///x.db", system_metrics=argument).destination().settings
    assert settings["system_metrics"] is wanted


@pytest.mark.long
def test_a_server_with_passwords(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flask_wtf")
    folder = tmp_path / "server"
    folder.mkdir()
    password = "correct-horse-battery"
    server = OtherServer(
        folder,
        sys.executable,
        "--app-name",
        "basic-auth",
        MLFLOW_AUTH_ADMIN_PASSWORD=password,
        MLFLOW_FLASK_SERVER_SECRET_KEY="for-this-test-only",
    )
    with server:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-horse-battery")
        training = Training(run)
        shipper = start_shipper(run, MLflow(server.uri, "guarded", patience_s=1.0))
        training.batch()
        until(lambda: "tracking server: cannot" in (run.path / "shipper.log").read_text(), 60)
        training.end("done", "finished")
        assert shipper is not None
        assert shipper.wait(60) == 1
        log = (run.path / "shipper.log").read_text()
        assert log.count("interlock.shipper: tracking server: cannot") == 1, log
        assert "401" in log or "not authenticated" in log.lower() or "UNAUTHENTICATED" in log, log
        assert "horse" not in log
        with pytest.raises(FetchError, match="are the credentials in the environment"):
            retrieve("mlflow:0f3c", MLflow(server.uri), tmp_path / "here", wait_s=2.0)

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        assert sync(run, timeout=60).complete
        remote = server.database.run(run.id)
        assert remote.status == "FINISHED"
        assert_once(run, remote)
        seen = status(run)
        assert password not in f"{seen}{(run.path / 'tracker.json').read_text()}", (
            "it stays in the environment"
        )
        with pytest.raises(FetchError, match="no checkpoint of this run"):
            retrieve(f"mlflow:{remote.id}", MLflow(server.uri), tmp_path / "here", wait_s=30.0)


class TLSServer(OtherServer):
    """One that is spoken to by https, with a certificate that nobody has signed but itself."""

    def __init__(self, folder: Path):
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
        command = ["openssl", *words.split(), "-keyout", key, "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True)
        options = f"--ssl-keyfile={key} --ssl-certfile={self.certificate}"
        super().__init__(folder, sys.executable, "--uvicorn-opts", options)
        self.uri = f"https://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        context = ssl.create_default_context(cafile=self.certificate)
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.mark.long
@pytest.mark.skipif(
    not shutil.which("openssl"), reason="openssl, which makes the certificate, is not installed"
)
def test_a_server_with_tls(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with TLSServer(folder) as server:
        training = Training(run)
        position = training.batch()
        training.end("done", "finished")
        report = sync(run, tracker=MLflow(server.uri), timeout=2)
        assert not report.complete
        assert "CERTIFICATE_VERIFY_FAILED" in (run.path / "shipper.log").read_text()
        with monkeypatch.context() as insecure:
            insecure.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
            assert sync(run, timeout=60).complete
        training = Training(run, position, done=1)
        training.batch()
        training.end("done", "finished")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(server.certificate))
        assert sync(run, timeout=60).complete
        assert server.database.run(run.id).tags["interlock.attempt"] == "2"


@pytest.mark.long
@pytest.mark.skipif(not OLDER, reason="MLFLOW2_PYTHON does not name an interpreter with mlflow 2.x")
def test_a_server_of_mlflow_2(run: RunFolder, tmp_path: Path) -> None:
    found = subprocess.run(
        [OLDER, "-c", "import mlflow; print(mlflow.__version__)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("2.")
    folder = tmp_path / "server"
    folder.mkdir()
    with OtherServer(folder, OLDER) as server:
        training = Training(run)
        shipper = start_shipper(run, MLflow(server.uri, "older", upload="all"))
        for _ in range(2 * BATCHES):
            training.batch()
        name = training.checkpoint(best=True)
        training.end("done", "finished")
        assert shipper is not None
        assert shipper.wait(120) == 0, (run.path / "shipper.log").read_text()
        remote = server.database.run(run.id)
        assert (remote.status, remote.experiment) == ("FINISHED", "older")
        assert_once(run, remote)
        assert remote.tags["interlock.checkpoint.best"] == name
        (there,) = (folder / "artifacts").rglob(f"checkpoints/{name}/manifest.json")
        assert there.read_bytes() == b"{}"
        # What this training calls a checkpoint is none that could be read: the journal is, which is as far as it gets.
        with pytest.raises(FetchError, match="no checkpoint of this run is at the server"):
            retrieve(f"mlflow:{remote.id}", MLflow(server.uri), tmp_path / "here", say=lambda text: None)
