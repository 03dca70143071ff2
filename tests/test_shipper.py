"""Delivery to a real MLflow: a server on the loopback interface, and the plain SQLite store."""

import calendar
import gzip
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deliveries import (
    BATCHES,
    ENVIRONMENT,
    Training,
    assert_once,
    expected_points,
    go_back,
    train_in_child,
    until,
)
from mlflow_server import Database, MLflowServer, RemoteRun
from states.table import State
from tracking.artifacts import REPORTS
from tracking.delivery import TrackerError
from tracking.journal import Journal, Parent
from tracking.mlflow_delivery import MLflow
from tracking.outbox import Flight, Outbox, select
from tracking.runs import RunFolder, create_run, lease_holder
from tracking.shipper import NotTrackedError, start_shipper, status, sync


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """Not started: the first test that uses it begins with a server that is down."""
    server = MLflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def shipped(run: RunFolder) -> bool:
    return lease_holder(run.outbox_lease) is None


def log_of(run: RunFolder) -> str:
    return (run.path / "shipper.log").read_text()


def wait_for_shipper(run: RunFolder, process: "subprocess.Popen[bytes] | None") -> None:
    assert process is not None
    assert process.wait(60) == 0, log_of(run)


# -- what arrives ------------------------------------------------------------------------------------------


def test_a_run_arrives_whole(
    run: RunFolder, store: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A folder of the user's that happens to have this package's name does not get in the way.
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking/__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    training = Training(run)
    shipper = start_shipper(run, MLflow(store.uri))
    for _ in range(2 * BATCHES):
        training.batch()
    training.writer.metrics(
        "train", 1, -1, 1, {"odd": float("nan"), "big": float("inf")}, 1_700_000_000_123_456_789
    )
    training.writer.sync()
    until(lambda: store.runs(run.id))
    until(lambda: store.run(run.id).tags.get("interlock.state") == "BATCH_END")
    living = store.run(run.id)
    assert living.status == "RUNNING"
    seen = calendar.timegm(time.strptime(living.tags["interlock.heartbeat"], "%Y-%m-%dT%H:%M:%SZ"))
    assert abs(time.time() - seen) < 60
    assert living.tags["interlock.attempt.1"].startswith("running; ")
    assert status(run).shipper is not None
    best = training.checkpoint(best=True)
    training.batch()
    last = training.checkpoint()
    training.end("done", "finished")
    wait_for_shipper(run, shipper)

    remote = store.run(run.id)
    points = {(key, step): (value, time_ms) for key, step, value, time_ms in remote.points}
    assert points.pop(("train/odd", 1)) == (None, 1_700_000_000_123)
    assert points.pop(("train/big", 1)) == (sys.float_info.max, 1_700_000_000_123)
    expected = expected_points(run)
    del expected["train/odd", 1], expected["train/big", 1]
    assert {point: value for point, (value, _) in points.items()} == expected
    assert len(remote.points) == len(expected) + 2

    with Journal.open(run) as journal:
        attempt = journal.attempts()[0]
        rows = list(journal.transitions())
    assert (remote.status, remote.end_ms) == ("FINISHED", (attempt.ended_ns or 0) // 1_000_000)
    assert (remote.name, remote.experiment) == ("digits", "Default")
    assert remote.params == {"lr": "0.1"}
    assert remote.tags["interlock.outcome"] == "done"
    assert remote.tags["interlock.reason"] == "finished"
    assert remote.tags["interlock.state"] == "DONE"
    assert remote.tags["interlock.attempt"] == "1"
    assert remote.tags["interlock.host"] == attempt.host
    assert remote.tags["interlock.checkpoint.last"] == last
    assert remote.tags["interlock.checkpoint.best"] == best
    assert remote.tags["mlflow.source.name"] == "train.py"

    for name in (best, last):
        here, there = run.checkpoints / name, remote.artifacts / "checkpoints" / name
        assert {file.name: file.read_bytes() for file in there.iterdir()} == {
            file.name: file.read_bytes() for file in here.iterdir()
        }
    with gzip.open(remote.artifacts / "transitions.jsonl.gz", "rt") as lines:
        logged = [json.loads(line) for line in lines]
    assert [row["seq"] for row in logged] == [row.seq for row in rows]
    assert logged[2] | {"time_ns": 0} == {
        "seq": 3, "attempt": 1, "scope": "train", "epoch": 0, "batch": 0, "phase": "", "trigger": "forward",
        "source": "BATCH_START", "dest": "FORWARD", "time_ns": 0, "duration_ns": 1_000_003, "loss": 1.0, "note": "",
    }  # fmt: skip
    assert "<svg" in (remote.artifacts / "machine.svg").read_text()
    assert (remote.artifacts / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run.id in (remote.artifacts / "timeline.html").read_text()
    assert not (run.path / "uploading").exists()
    wal = run.journal.with_name("journal.sqlite-wal")
    assert not wal.exists() or not wal.stat().st_size, "the journal is one file"
    assert (run.path / "tracker.json").stat().st_mode & 0o777 == 0o600

    now = status(run)
    assert (now.points_delivered, now.points_waiting) == (len(remote.points), 0)
    assert (now.artifacts_delivered, now.artifacts_waiting) == (2 + len(REPORTS), ())
    assert (now.remote_run_id, now.trouble) == (remote.id, "")
    assert now.command == f"mlflow ui --backend-store-uri {store.uri}"
    assert "INFO" not in log_of(run)
    report = sync(run)
    assert report.complete
    assert report.points_delivered == 0


ENDS = {"failed": "FAILED", "stopped": "KILLED", "died": "KILLED"}


@pytest.mark.long
def test_the_status_tells_the_truth(tmp_path: Path, store: Database) -> None:
    runs = {outcome: create_run(tmp_path, outcome) for outcome in ENDS}
    children = [
        train_in_child(
            run,
            f"""
training = Training(run)
start_shipper(run, MLflow({store.uri!r}, experiment_name="ends"))
for _ in range(7): training.batch()
training.writer.sync()
until(lambda: status(run).points_delivered)
{"os.kill(os.getpid(), signal.SIGKILL)" if outcome == "died" else ""}
training.end({outcome!r}, "because", "ValueError: no\\nmore" if {outcome == "failed"} else "")
""",
        )
        for outcome, run in runs.items()
    ]
    assert [child.wait(60) for child in children] == [0, 0, -signal.SIGKILL]
    for outcome, run in runs.items():
        until(lambda run=run: shipped(run))
        remote = store.run(run.id)
        assert remote.status == ENDS[outcome], log_of(run)
        assert remote.experiment == "ends"
        assert remote.tags["interlock.state"] == "HALTED"
        assert remote.tags["interlock.outcome"] == outcome
        assert remote.tags.get("interlock.exception", "") == (
            "ValueError: no\nmore" if outcome == "failed" else ""
        )
        assert remote.tags["interlock.reason"] == ("the process died" if outcome == "died" else "because")
        assert_once(run, remote)
        with Journal.open(run) as journal:
            assert list(journal.transitions())[-1].dest is State.HALTED


@pytest.mark.long
def test_a_replay_is_not_sent_again_and_the_run_stays_the_same(run: RunFolder, store: Database) -> None:
    first = Training(run)
    shipper = start_shipper(run, MLflow(store.uri))
    for done in range(1, 9):
        seq = first.batch()
        if done == 4:
            position = seq
    first.end("stopped", "SIGTERM")
    wait_for_shipper(run, shipper)
    assert store.run(run.id).status == "KILLED"
    before = store.run(run.id).points

    second = Training(run, position, done=4)
    shipper = start_shipper(run, MLflow(store.uri))
    until(lambda: store.run(run.id).status == "RUNNING")
    for _ in range(8):
        second.batch()
    second.end()
    wait_for_shipper(run, shipper)
    remote = store.run(run.id)
    assert remote.status == "FINISHED"
    assert set(before) < set(remote.points)
    assert remote.tags["interlock.attempt"] == "2"
    assert remote.tags["interlock.reason"] == ""
    assert_once(run, remote)


@pytest.mark.parametrize("seed", [7])
def test_killing_shipper_and_trainer_at_random_loses_and_doubles_nothing(
    run: RunFolder, store: Database, seed: int
) -> None:
    kill_at_random(run, store, random.Random(seed), attempts=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killing_at_random_for_long(run: RunFolder, store: Database, seed: int) -> None:
    # So slowly that all of it is among the first 10,000 values, of which each is delivered.
    kill_at_random(run, store, random.Random(seed), attempts=6, pause_s=0.01)


def kill_at_random(
    run: RunFolder, store: Database, chance: random.Random, attempts: int, pause_s: float = 0.002
) -> None:
    position: int | None = None
    done = 0
    for _ in range(attempts):
        trainer = train_in_child(
            run,
            f"""
training = Training(run, {position}, {done})
start_shipper(run, MLflow({store.uri!r}, upload="none"))
while True: training.batch({pause_s})
""",
        )
        until(lambda: (now := status(run)).points_waiting or now.points_delivered)
        deadline = time.monotonic() + chance.uniform(1.0, 4.0)
        while time.monotonic() < deadline:
            time.sleep(chance.uniform(0.0, 1.5))
            holder = lease_holder(run.outbox_lease)
            if holder is not None:
                os.kill(holder.pid, signal.SIGKILL)
                start_shipper(run, MLflow(store.uri, upload="none"))
        trainer.kill()
        trainer.wait()
        if chance.random() < 0.5 and (holder := lease_holder(run.outbox_lease)) is not None:
            os.kill(holder.pid, signal.SIGKILL)
        position, done, _ = go_back(run, chance)
    report = sync(run, timeout=30)
    assert report.complete, log_of(run)
    remote = store.run(run.id)
    assert remote.status == "KILLED"
    points = [(key, step) for key, step, _, _ in remote.points]
    assert len(points) == len(set(points))
    found = {(key, step): value for key, step, value, _ in remote.points}
    missing = {point: value for point, value in expected_points(run).items() if found.get(point) != value}
    assert not missing, (missing, {point: found.get(point) for point in missing}, log_of(run))


@pytest.mark.long
def test_an_outbox_that_is_lost(run: RunFolder, store: Database) -> None:
    training = Training(run)
    for _ in range(8):
        training.batch()
    training.writer.sync()
    report = sync(run, tracker=MLflow(store.uri, upload="none"))
    assert (report.complete, report.points_delivered) == (True, 8 * 2 + 3)
    assert store.run(run.id).status == "RUNNING"
    run.outbox.write_bytes(b"not a database" * 100)
    for _ in range(8):
        training.batch()
    training.end()
    assert sync(run).complete
    assert "was damaged" in log_of(run)
    assert_once(run, store.run(run.id))
    assert store.run(run.id).status == "FINISHED"


# -- outages -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_server_that_is_down_at_the_start_in_the_middle_and_at_the_end(
    run: RunFolder, server: MLflowServer
) -> None:
    training = Training(run)
    shipper = start_shipper(run, MLflow(server.uri, "outages", patience_s=1.0))
    training.batch()
    until(lambda: "tracking server: cannot" in log_of(run))
    server.start()
    until(lambda: status(run).points_delivered)
    server.stop()
    for _ in range(7):
        training.batch()
    last = training.checkpoint()
    training.writer.sync()
    until(lambda: log_of(run).count("tracking server: cannot") == 2)
    time.sleep(1.5)
    assert log_of(run).count("tracking server: cannot") == 2, "one warning for each outage"
    training.end()
    assert shipper is not None
    assert shipper.wait(30) == 1
    assert f"interlock sync {run.id}" in log_of(run)
    waiting = status(run)
    assert waiting.points_waiting
    assert waiting.artifacts_waiting == (f"checkpoints/{last}", *REPORTS)
    assert "could not be reached" in waiting.trouble
    assert server.database.run(run.id).status == "RUNNING"

    server.start()
    report = sync(run, timeout=30)
    assert report.complete
    assert (report.artifacts_delivered, report.points_delivered) == (1 + len(REPORTS), waiting.points_waiting)
    remote = server.database.run(run.id)
    assert remote.status == "FINISHED"
    assert report.url == f"{server.uri}/#/experiments/1/runs/{remote.id}"
    assert_once(run, remote)
    for file in (run.checkpoints / last).iterdir():
        (there,) = (server.folder / "artifacts").rglob(
            f"{remote.id}/artifacts/checkpoints/{last}/{file.name}"
        )
        assert there.read_bytes() == file.read_bytes()


@pytest.mark.long
def test_the_status_is_told_where_only_files_cannot_be_delivered(
    run: RunFolder, store: Database, tmp_path: Path
) -> None:
    training = Training(run)
    training.batch()
    training.writer.sync()
    assert sync(run, tracker=MLflow(store.uri, "no files", upload="none")).complete
    (tmp_path / "file").touch()
    connection = sqlite3.connect(store.path)
    with connection:
        connection.execute(
            "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?",
            (f"{tmp_path}/file/x", store.run(run.id).id),
        )
    connection.close()
    training.checkpoint()
    training.end("failed", "because", "ValueError")
    report = sync(run, timeout=0)
    assert report.artifacts_left == tuple(REPORTS)
    assert report.points_left == 0
    assert "artifact store: cannot upload transitions.jsonl.gz" in log_of(run)
    assert store.run(run.id).status == "FAILED"
    (tmp_path / "file").unlink()
    assert sync(run).complete


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sqlite", "http", "file"])
def test_points_of_which_nobody_knows_whether_they_arrived(
    run: RunFolder,
    store: Database,
    shared_server: MLflowServer,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shipper dies after the server has taken a flight, and before it is struck out."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    server = shared_server
    uri = {"sqlite": store.uri, "http": server.uri, "file": (tmp_path / "files").as_uri()}[kind]
    training = Training(run)
    for _ in range(7):
        training.batch()
    training.end()
    assert sync(run, tracker=MLflow(uri)).complete
    with Journal.open(run) as journal, Outbox.open(run.outbox) as outbox:
        flight = select(journal.measured(), {}, lambda name: name.replace("@", "_"))
        assert flight is not None
        outbox.arrived(Flight(0, (), {}))
        outbox.depart(flight)
    report = sync(run)
    assert report.complete
    if kind == "file":
        lines = [
            (file.relative_to(file.parent.parent).as_posix(), int(line.split()[2]))
            for file in (tmp_path / "files").rglob("metrics/*/*")
            for line in file.read_text().splitlines()
        ]
        assert sorted(lines) == sorted((key, step) for key, step in expected_points(run))
    else:
        assert_once(run, (store if kind == "sqlite" else server.database).run(run.id))


@pytest.mark.long
def test_what_the_server_refuses_is_said_and_the_rest_arrives(
    run: RunFolder, shared_server: MLflowServer
) -> None:
    server = shared_server
    training = Training(run)
    training.batch()
    training.writer.metrics("train", 0, 0, 1, {"../up": 1.0, "x" * 300: 2.0, "fine": 3.0}, time.time_ns())
    training.writer.metrics("train", 0, 0, 2, {"../up": 1.0, "fine": 4.0}, time.time_ns())
    training.writer.sync()
    connection = sqlite3.connect(run.journal)
    params = {"lr": 0.1, "../p": 1, "long": "y" * 7000, "data": {"seed": 3, "split": [1, 2]}}
    with connection:
        connection.execute("UPDATE attempts SET params = ?", (json.dumps(params),))
    connection.close()
    training.end()
    assert sync(run, tracker=MLflow(server.uri)).complete
    remote = server.database.run(run.id)
    assert {(key, step) for key, step, _, _ in remote.points} == {
        ("batch/loss", 1), ("batch/acc_1", 1), ("batch/fine", 1), ("batch/fine", 2),
        ("train/loss", 0), ("train/lr", 0), ("val/loss", 0),
    }  # fmt: skip
    assert {key: len(value) for key, value in remote.params.items()} == {
        "lr": 3,
        "long": 6000,
        "data.seed": 1,
        "data.split": 6,
    }
    assert remote.status == "FINISHED"
    assert log_of(run).count("metric batch/../up") == 1
    assert "param long: 7000 characters cut to 6000" in log_of(run)


@pytest.mark.long
def test_a_deleted_run_is_said_and_not_made_again(run: RunFolder, store: Database) -> None:
    training = Training(run)
    training.batch()
    training.writer.sync()
    assert sync(run, tracker=MLflow(store.uri)).complete
    reports = {file.name for file in store.run(run.id).artifacts.iterdir()}
    assert reports == set(REPORTS), "also while it trains"
    connection = sqlite3.connect(store.path)
    with connection:
        connection.execute(
            "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (store.run(run.id).id,)
        )
    connection.close()
    training.end()
    report = sync(run)
    assert not report.complete
    assert "was deleted; restore it with `mlflow runs restore" in report.trouble
    assert report.points_left == 3
    assert len(store.runs(run.id)) == 1


# -- living together ---------------------------------------------------------------------------------------

_USERS = """
import os, pathlib, sys
import mlflow
from deliveries import *
from tracking.mlflow_delivery import MLflow; from tracking.runs import *; from tracking.shipper import *
mlflow.set_tracking_uri(sys.argv[2])
mlflow.set_experiment("theirs")
run, second = (RunFolder(pathlib.Path(path)) for path in (sys.argv[1], sys.argv[3]))
with mlflow.start_run(run_name="my own") as active:
    mlflow.log_param("mine", 1)
    training = Training(run)
    shipper = start_shipper(run, MLflow())
    training.batch()
    training.end()
    assert shipper.wait(60) == 0
    found = mlflow.get_run(active.info.run_id)
    assert found.info.status == "RUNNING" and found.info.end_time is None, found
    print(active.info.run_id)
mlflow.set_experiment("others")
print(MLflow().destination().settings["experiment_id"], mlflow.get_experiment_by_name("others").experiment_id)

theirs = mlflow.MlflowClient().create_run("0").info.run_id
os.environ["MLFLOW_RUN_ID"] = theirs
Training(second).end("failed", "because", "ValueError")
assert sync(second, tracker=MLflow(upload="none")).complete
del os.environ["MLFLOW_RUN_ID"]
second.outbox.unlink()
assert sync(second, tracker=MLflow(upload="none", experiment_name="Default")).complete, "found by our tag, still theirs"
found = mlflow.get_run(theirs)
assert found.info.status == "RUNNING" and found.info.end_time is None, found
assert found.data.tags["interlock.outcome"] == "failed"
"""


@pytest.mark.long
def test_a_run_that_the_user_began_is_used_and_never_ended(run: RunFolder, store: Database) -> None:
    second = create_run(run.path.parent, "second")
    done = subprocess.run(
        [sys.executable, "-c", _USERS, str(run.path), store.uri, str(second.path)],
        env=ENVIRONMENT, capture_output=True, text=True, cwd=run.path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + log_of(run)
    run_id, number, expected_number = done.stdout.split()
    remote = store.run(run.id)
    assert (remote.id, remote.name, remote.status) == (run_id, "my own", "FINISHED")  # by their with block
    assert remote.params == {"mine": "1", "lr": "0.1"}
    assert number == expected_number
    assert_once(run, remote)
    assert store.run(second.id).status == "RUNNING"


@pytest.mark.long
def test_a_branch_is_shown_below_its_parent(tmp_path: Path, store: Database) -> None:
    """The parent's own id is told as soon as the parent's outbox has it; elsewhere it would mean nothing."""
    mother = create_run(tmp_path, "mother")
    parent = Parent(mother.id, str(mother.path), 12, "00000012-a1", "branch")
    child, stranger = create_run(tmp_path, "child", parent), create_run(tmp_path, "stranger", parent)
    for run in (mother, child, stranger):
        training = Training(run)
        training.batch()
        training.end()
    there = MLflow(tracking_uri=store.uri)
    assert sync(child, tracker=there).complete
    tags = store.run(child.id).tags
    assert (tags["interlock.parent"], tags["interlock.parent_seq"]) == (mother.id, "12")
    assert "mlflow.parentRunId" not in tags
    elsewhere = MLflow(tracking_uri=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    assert sync(mother, tracker=elsewhere).complete
    assert sync(stranger, tracker=there).complete
    assert "mlflow.parentRunId" not in store.run(stranger.id).tags
    assert sync(mother, tracker=there).complete
    assert "interlock.parent" not in store.run(mother.id).tags
    training = Training(child, position=1)
    training.end("stopped")
    assert sync(child).complete
    assert store.run(child.id).tags["mlflow.parentRunId"] == store.run(mother.id).id


def test_nothing_here_imports_mlflow() -> None:
    code = """
import sys
import tracking.delivery, tracking.mlflow_delivery, tracking.shipper, tracking.outbox
tracking.mlflow_delivery.MLflow().destination()
assert "mlflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def where(tracker: MLflow) -> dict[str, Any]:
    return dict(tracker.destination().settings)


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = {"experiment": None, "experiment_id": None, "run_id": None, "system_metrics": True}
    assert where(MLflow()) == {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", **nothing}
    assert where(MLflow("sqlite:///a/b.db?x=1"))["tracking_uri"] == f"sqlite:///{tmp_path}/a/b.db?x=1"
    assert where(MLflow("./old"))["tracking_uri"] == f"file://{tmp_path}/old"
    assert where(MLflow("old"))["tracking_uri"] == f"file://{tmp_path}/old"
    assert where(MLflow(Path("old")))["tracking_uri"] == f"file://{tmp_path}/old"
    assert where(MLflow("file:old"))["tracking_uri"] == f"file://{tmp_path}/old"
    for as_it_is in (
        "http://h:5000",
        "databricks",
        "databricks://p",
        "postgresql://u:p@h/d",
        "file:///x",
        "sqlite:////x",
    ):
        assert where(MLflow(as_it_is))["tracking_uri"] == as_it_is
    (tmp_path / "mlruns/12").mkdir(parents=True)
    assert where(MLflow())["tracking_uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlruns/12/meta.yaml").touch()
    assert where(MLflow())["tracking_uri"] == f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///c.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    assert where(MLflow()) == {
        "tracking_uri": f"sqlite:///{tmp_path}/c.db", "experiment": None, "experiment_id": "4", "run_id": "abc",
        "system_metrics": True,
    }  # fmt: skip
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
    assert where(MLflow())["experiment"] == "named"
    assert where(MLflow())["experiment_id"] is None
    assert where(MLflow("http://h", "mine", "def")) == {
        "tracking_uri": "http://h", "experiment": "mine", "experiment_id": None, "run_id": "def",
        "system_metrics": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"upload": "some"}, {"patience_s": -1}, {"experiment_name": " "}, {"run_id": 3}, {"tracking_uri": 5}],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrackerError, match=next(iter(wrong))):
        MLflow(**wrong)


# -- checkpoints -------------------------------------------------------------------------------------------


def folders(remote: RemoteRun) -> set[str]:
    return {path.name for path in (remote.artifacts / "checkpoints").glob("*")}


@pytest.mark.long
def test_best_and_last_replace_those_before(run: RunFolder, store: Database) -> None:
    training = Training(run)
    training.batch()
    old, best = training.checkpoint(best=True), ""
    training.writer.sync()
    sync(run, tracker=MLflow(store.uri))
    assert folders(store.run(run.id)) == {old}
    training.batch()
    best = training.checkpoint(best=True)
    training.batch()
    gone = training.checkpoint()
    shutil.rmtree(run.checkpoints / gone)  # as retention does, whose row comes a moment later
    training.writer.sync()
    sync(run)
    remote = store.run(run.id)
    assert folders(remote) == {best}
    assert (remote.tags["interlock.checkpoint.last"], remote.tags["interlock.checkpoint.best"]) == (
        best,
        best,
    )
    training.writer.checkpoint_removed(gone)
    training.batch()
    last = training.checkpoint()
    training.end()
    assert sync(run).complete
    assert folders(store.run(run.id)) == {best, last}
    assert status(run).artifacts_delivered == 2 + len(REPORTS)


@pytest.mark.long
def test_all_and_none(run: RunFolder, store: Database) -> None:
    training = Training(run)
    names = set()
    for _ in range(3):
        training.batch()
        names.add(training.checkpoint())
    training.end()
    assert sync(run, tracker=MLflow(store.uri, upload="none")).complete
    assert folders(store.run(run.id)) == set()
    assert sync(run, tracker=MLflow(store.uri, upload="all")).complete
    assert folders(store.run(run.id)) == names


# -- the process -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_next_attempt_of_the_same_process_gets_a_shipper_of_its_own(
    run: RunFolder, store: Database
) -> None:
    """Two shippers, one lease: the second waits for the first, or takes over; both leave."""
    training = Training(run)
    first = start_shipper(run, MLflow(store.uri, upload="none"))
    position = training.batch()
    training.end("stopped")
    again = Training(run, position, done=1)
    second = start_shipper(run, MLflow(store.uri, upload="none"))
    again.batch()
    again.end()
    assert first is not None
    assert second is not None
    assert {first.wait(60), second.wait(60)} <= {0, 1}
    remote = store.run(run.id)
    assert remote.status == "FINISHED"
    assert_once(run, remote)


@pytest.mark.long
def test_sync_beside_a_shipper_says_so_and_waits(run: RunFolder, store: Database) -> None:
    training = Training(run)
    start_shipper(run, MLflow(store.uri))
    until(lambda: not shipped(run))
    for _ in range(20):
        training.batch()
    timer = threading.Timer(2.0, training.end)
    timer.start()
    told: list[str] = []
    report = sync(run, progress=told.append, timeout=60)
    timer.join()
    assert "delivers this run at the moment; waiting for it" in told[0]
    assert report.points_left == 0
    until(lambda: shipped(run))
    assert_once(run, store.run(run.id))


@pytest.mark.long
def test_sync_tells_the_status_though_another_holds_the_lease_of_a_run_that_died(
    run: RunFolder, store: Database
) -> None:
    """As a shipper does that writes down the end, and whoever tidies the journal."""
    trainer = train_in_child(
        run, "training = Training(run); training.batch(); training.writer.sync(); os.kill(os.getpid(), 9)"
    )
    assert trainer.wait(60) == -signal.SIGKILL
    holder = train_in_child(
        run, "with Lease.acquire(run): until(lambda: status(run).points_delivered, 60); time.sleep(2.0)"
    )
    until(lambda: lease_holder(run) is not None)
    assert sync(run, tracker=MLflow(store.uri, upload="none")).complete
    assert holder.wait(60) == 0
    assert store.run(run.id).status == "KILLED"


def test_two_may_begin_to_deliver_at_the_same_moment(run: RunFolder) -> None:
    """A training that goes on, and `interlock sync` by hand."""
    code = """
from tracking import shipper
for number in range(300): shipper._write_target(run, MLflow(f"http://h:{number}"))
"""
    writers = [train_in_child(run, code) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert status(run).place == "http://h:299"
    assert not list(run.path.glob("*.new"))


def test_a_run_without_a_tracker(run: RunFolder) -> None:
    assert not status(run).tracked
    with pytest.raises(NotTrackedError, match="track=None"):
        sync(run)
