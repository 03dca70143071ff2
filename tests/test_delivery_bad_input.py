"""Places that are none, credentials that do not do, runs that are gone, params that are refused: a message each."""

import json
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import trainings
from deliveries import Training, assert_once, until
from faulty_proxy import FaultyProxy
from mlflow_server import MLflowServer
from orchestrator import MLflow as FromTheTrainer
from orchestrator import Trainer
from states.table import State
from tracking.artifacts import REPORTS
from tracking.delivery import TrackerError
from tracking.mlflow_delivery import MLflow
from tracking.runs import RunFolder, list_runs
from tracking.shipper import status, sync


@pytest.fixture
def server(shared_server: MLflowServer) -> MLflowServer:
    return shared_server


def log_of(run: RunFolder) -> list[str]:
    return (run.path / "shipper.log").read_text().splitlines()


def trained(run: RunFolder) -> RunFolder:
    training = Training(run)
    for _ in range(3):
        training.batch()
    training.end()
    return run


def admin(server: MLflowServer, what: str, **values: str) -> dict[str, Any]:
    """What a person does at the server, by MLflow's REST API."""
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/{what}",
        json.dumps(values).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.loads(answer.read()))


# -- places ------------------------------------------------------------------------------------------------


NO_PLACES = [
    ("http://", "names no host"),
    ("http:/host", "names no host"),
    ("http//host", "no colon before its //"),
    ("htp://x", "'htp' is none of the schemes http, https, sqlite, .* \\(is 'http' meant"),
    ("postgres://u:secret@host/db", "is 'postgresql' meant"),
    ("http+x://host", "'http\\+x' is none of the schemes"),
    ("localhost:5000", "a host and a port without the http:// before them, 'http://localhost:5000'"),
    ("10.0.0.1:5000/", "a host and a port without the http://"),
    ("http://host:port/", "Port could not be cast"),
    ("http://[::1", "Invalid IPv6 URL"),
    ("sqlite:/x", "after 'sqlite' comes ':///'"),
    ("postgresql+psycopg2:/x", "after 'postgresql\\+psycopg2' comes '://'"),
    ("sqlite://x.db", "a file has three"),
    ("file://mlruns", "a path has three"),
    ("sqlite:///:memory:", "gone with the process"),
    ("sqlite://", "gone with the process"),
    ('"http://host"', "no scheme before its ://"),
    ("http//u:secret@host", "no colon"),
    ("http://host\n", "white space"),
]


@pytest.mark.parametrize(("uri", "said"), NO_PLACES)
def test_what_is_no_place_is_refused_before_anything_is_written(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackerError, match=rf"tracking_uri=.*{said}.*expected one such as") as told:
        MLflow(uri)
    assert "secret" not in str(told.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    root = tmp_path / "runs"
    for begin in (Trainer.fit, Trainer.advance, Trainer.rehearse):
        with pytest.raises(TrackerError, match=f"MLFLOW_TRACKING_URI: .*{said}.*track=None"):
            begin(trainings.make(root, track=MLflow()))
    assert not root.exists()


@pytest.mark.parametrize(
    "uri",
    [
        *("http://host", "HTTPS://u:p@host:5000/path", "databricks", "databricks://profile", "uc:http://host"),
        *("sqlite:///a.db", "sqlite:////a/b.db?x=1", "postgresql:///db", "mysql+pymysql://u:p@h/d", "mssql://h/d"),
        *("mlruns", "./a:b", "/a b", "~/runs", "file:old", "file:///x", "file://localhost/x", "http", "httpd/runs"),
    ],
)  # fmt: skip
def test_what_may_be_a_place(uri: str) -> None:
    assert MLflow(uri).destination().place


def test_schemes_that_other_packages_give_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrackerError, match="'plugged' is none"):
        MLflow("plugged://x")
    package = tmp_path / "plugged-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[mlflow.tracking_store]\nplugged = plugged:Store\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert MLflow("plugged://x").destination().place == "plugged://x"


@pytest.mark.long
def test_a_driver_that_is_not_installed_is_said_once(run: RunFolder) -> None:
    report = sync(trained(run), tracker=MLflow("mysql://u@localhost/x"), timeout=60)
    assert "install the driver that the URI asks for" in report.trouble
    assert (report.points_left, report.artifacts_left) == (9, tuple(REPORTS))
    assert len(log_of(run)) == 1, "once"


@pytest.mark.long
def test_a_target_that_is_no_place_is_said_by_the_shipper_too(run: RunFolder) -> None:
    sync(trained(run), tracker=MLflow("mysql://u@localhost/x"), timeout=60)
    target = run.path / "tracker.json"
    target.write_text(target.read_text().replace("mysql://u@localhost/x", "http://"))
    assert "names no host" in sync(run, timeout=60).trouble


@pytest.mark.long
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1 gives no answer: Failed to establish a new connection"),
        ("http://no-such-host.invalid:5", "Failed to resolve 'no-such-host.invalid'"),
        ("postgresql+psycopg2://u@127.0.0.1:1/x", "Connection refused"),
    ],
)
def test_a_place_that_cannot_be_reached_is_said_once_and_tried_again(
    run: RunFolder, uri: str, said: str
) -> None:
    report = sync(trained(run), tracker=MLflow(uri), timeout=8)
    first, last = (line for line in log_of(run) if "interlock.shipper" in line)
    assert said in first
    assert f"9 points and {len(REPORTS)} artifacts are left" in last
    assert f"interlock sync {run.id}" in report.trouble
    assert len(log_of(run)) == 2


def test_training_goes_on_and_ends_with_one_warning(tmp_path: Path) -> None:
    trainer = trainings.make(
        tmp_path, epochs=None, max_batches=60, track=FromTheTrainer("mysql://u@localhost/x")
    )
    trainer.advance(State.BATCH_END)
    (run,) = list_runs(tmp_path)
    until(lambda: status(run).trouble, 60)
    with pytest.warns(
        RuntimeWarning, match="training is not affected, but tracking has trouble.*install the driver"
    ) as told:
        result = trainer.fit()
    assert len([warning for warning in told if "tracking" in str(warning.message)]) == 1
    assert result.state is State.DONE
    assert result.mlflow_run_id is None


# -- who may -----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("answer", ["401", "403"])
def test_credentials_that_are_refused_are_said_once_and_tried_again(
    run: RunFolder, server: MLflowServer, answer: str
) -> None:
    with FaultyProxy(server.port, lambda what: answer) as proxy:
        report = sync(trained(run), tracker=MLflow(proxy.uri), timeout=1)
        assert "could not be reached" in report.trouble
        # Told at once, and where it gives up.
        told = [line for line in log_of(run) if "MLFLOW_TRACKING_USERNAME" in line]
        assert ["could not be reached" in line for line in told] == [False, True]
        proxy.choose = lambda what: "pass"
        assert sync(run).complete


@pytest.mark.long
def test_a_server_that_asks_for_a_password(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="MLflow's own authentication needs Flask-WTF")
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": "a password of 12", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    with MLflowServer(tmp_path, ["--app-name", "basic-auth"], secrets) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        report = sync(trained(run), tracker=MLflow(server.uri), timeout=1)
        assert not report.complete
        # Told at once, and where it gives up.
        told = [line for line in log_of(run) if "MLFLOW_TRACKING_PASSWORD" in line]
        assert ["could not be reached" in line for line in told] == [False, True]
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])
        assert sync(run).complete
        assert_once(run, server.database.run(run.id))
        assert "a password" not in "".join(log_of(run))


# -- what is gone ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_deleted_experiment_is_said_and_a_restored_one_gets_the_rest(
    run: RunFolder, server: MLflowServer
) -> None:
    """Deleted before the run, while it trains, and found again."""
    number = admin(server, "experiments/create", name="gone")["experiment_id"]
    admin(server, "experiments/delete", experiment_id=number)
    training = Training(run)
    training.batch()
    training.writer.sync()
    report = sync(run, tracker=MLflow(server.uri, "gone"))
    assert f"mlflow experiments restore --experiment-id {number}" in report.trouble
    admin(server, "experiments/restore", experiment_id=number)
    assert sync(run).complete
    admin(server, "experiments/delete", experiment_id=number)
    training.batch()
    training.end()
    report = sync(run)
    assert "was deleted; restore it with" in report.trouble
    assert report.points_left
    admin(server, "experiments/restore", experiment_id=number)
    admin(server, "runs/restore", run_id=server.database.runs(run.id)[0].id)
    assert sync(run).complete
    assert_once(run, server.database.run(run.id))
    assert sum("interlock.shipper: " in line and "deleted" in line for line in log_of(run)) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"run_id": "abcdef"}, "there is no MLflow run 'abcdef'"),
        ({"experiment_name": "x" * 600}, "experiment"),
    ],
)
def test_a_run_or_experiment_that_cannot_be(
    run: RunFolder, server: MLflowServer, settings: dict[str, Any], said: str
) -> None:
    report = sync(trained(run), tracker=MLflow(server.uri, **settings))
    assert said in report.trouble
    assert len(log_of(run)) == 1


@pytest.mark.long
def test_an_experiment_id_that_is_none(
    run: RunFolder, server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654")
    report = sync(trained(run), tracker=MLflow(server.uri))
    assert "987654" in report.trouble
    assert len(log_of(run)) == 1


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_params_that_are_refused_or_differ_are_said_and_the_rest_arrives(
    run: RunFolder, server: MLflowServer
) -> None:
    theirs = admin(server, "runs/create", experiment_id="0")["run"]["info"]["run_id"]
    admin(server, "runs/log-parameter", run_id=theirs, key="lr", value="0.5")
    training = Training(run)
    training.batch()
    params = {"lr": 0.1, "long": "y" * 7000, "../up": 1, "nul": "a\0b", "file": "caf\udce9"}
    set_params(run, params | {f"many.{n}": n for n in range(120)})
    training.end()
    assert sync(run, tracker=MLflow(server.uri, run_id=theirs)).complete
    remote = server.database.run(run.id)
    assert remote.params == {
        "lr": "0.5", "long": "y" * 5999 + "…", "nul": "a\ufffdb", "file": "caf?",
        **{f"many.{n}": str(n) for n in range(120)},
    }  # fmt: skip
    assert_once(run, remote)
    for param in ("lr", "../up", "long"):
        assert len([line for line in log_of(run) if f"param {param}" in line]) == 1, param


@pytest.mark.long
def test_a_param_that_a_resume_changes_is_a_tag(run: RunFolder, server: MLflowServer) -> None:
    training = Training(run)
    seq = training.batch()
    training.end("stopped")
    assert sync(run, tracker=MLflow(server.uri)).complete
    again = Training(run, seq, done=1)
    set_params(run, {"lr": 0.2}, attempt=2)
    again.end()
    assert sync(run).complete
    remote = server.database.run(run.id)
    assert remote.params == {"lr": "0.1"}
    assert remote.tags["interlock.attempt.2.lr"] == "0.2"


def set_params(run: RunFolder, params: dict[str, object], attempt: int = 1) -> None:
    connection = sqlite3.connect(run.journal, timeout=20)
    with connection:
        connection.execute("UPDATE attempts SET params = ? WHERE attempt = ?", (json.dumps(params), attempt))
    connection.close()
