"""A training with a tracker, from end to end: real shipper, real store; killed, resumed, delivered once."""

import calendar
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tracking.runs import RunFolder, list_runs
from tracking.shipper import status, sync

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch, trainings
from orchestrator import MLflow
from states import Trigger
torch.set_num_threads(1)
root, store, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
trainer = trainings.make(root, val_loader=trainings.loader(16), track=MLflow(tracking_uri=store))
if resume in ("SIGKILL", "SIGTERM", "SIGINT", "raise"):
    @trainer.after(Trigger.STEP)
    def kill():
        if trainer.batches == 9:
            if resume == "raise":
                raise ValueError("too hot")
            os.kill(os.getpid(), getattr(signal, resume))
trainer.fit(resume="auto")
assert "mlflow" not in sys.modules
print("done")
"""


def start(root: Path, store: str, what: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), store, what], env=environment)


def train(root: Path, store: str, what: str) -> int:
    return start(root, store, what).wait()


def wait_until_shipped(run: RunFolder) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found = status(run)
        if found.shipper is None and found.points_delivered and not found.points_waiting:
            return
        time.sleep(0.2)
    raise AssertionError(f"not delivered: {status(run)}")


def points(store: Path, run_id: str) -> dict[str, list[int]]:
    """The steps of each key, as the store has them."""
    found: dict[str, list[int]] = {}
    with sqlite3.connect(store) as connection:
        for key, step in connection.execute(
            "SELECT key, step FROM metrics WHERE run_uuid = ? ORDER BY key, step", (run_id,)
        ):
            found.setdefault(key, []).append(step)
    return found


@pytest.mark.long
def test_killed_with_its_shipper_then_resumed_every_point_arrives_once(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "mlflow.db"
    store = f"sqlite:///{file}"
    assert train(root, store, "SIGKILL") == -signal.SIGKILL
    (run,) = list_runs(root)
    if (shipper := status(run).shipper) is not None:
        os.kill(shipper.pid, signal.SIGKILL)
    assert train(root, store, "go on") == 0
    wait_until_shipped(run)
    report = sync(run, timeout=60)
    assert report.complete
    with sqlite3.connect(file) as connection:
        ((run_id, ended),) = connection.execute("SELECT run_uuid, status FROM runs").fetchall()
        models = connection.execute(
            """SELECT source_run_id, name, (SELECT count(*) FROM inputs WHERE destination_id = model_id)
               FROM logged_models"""
        ).fetchall()
    assert (run_id, ended) == (report.remote_run_id, "FINISHED")
    assert models == [(run_id, "model", 1)], "the final model, once, an output of the run"
    assert not run.final_model.exists()
    assert "delivered as its weights" not in (run.path / "shipper.log").read_text()
    found = points(file, run_id)
    for key in ("batch/loss", "batch/grad_norm", "batch/batch_time"):
        assert found[key] == list(range(1, 19)), key
    for key in ("train/loss", "train/lr", "val/loss"):
        assert found[key] == [0, 1, 2], key


ENDS = {
    "go on": ("FINISHED", "done", "DONE", ""),
    "raise": ("FAILED", "failed", "HALTED", "ValueError: too hot"),
    "SIGTERM": ("KILLED", "stopped", "HALTED", ""),
    "SIGINT": ("KILLED", "stopped", "HALTED", ""),
    "SIGKILL": ("KILLED", "died", "HALTED", ""),
}


@pytest.mark.long
def test_the_status_of_trainings_that_end_in_each_way(tmp_path: Path) -> None:
    """All at once, and none of them found a store: they make it together."""
    file = tmp_path / "mlflow.db"
    processes = [start(tmp_path / what, f"sqlite:///{file}", what) for what in ENDS]
    for process in processes:
        process.wait(120)
    for what, expected in ENDS.items():
        (run,) = list_runs(tmp_path / what)
        wait_until_shipped(run)
        with sqlite3.connect(file) as connection:
            ours = "SELECT run_uuid FROM tags WHERE key = 'interlock.run_id' AND value = ?"
            ((found,),) = connection.execute(f"SELECT status FROM runs WHERE run_uuid IN ({ours})", (run.id,))
            tags = dict(
                connection.execute(f"SELECT key, value FROM tags WHERE run_uuid IN ({ours})", (run.id,))
            )
        names = ("interlock.outcome", "interlock.state", "interlock.exception")
        assert (found, *(tags.get(name, "") for name in names)) == expected, what
        assert tags["interlock.attempt.1"].startswith(expected[1])
        assert what not in ("SIGTERM", "SIGINT") or what in tags["interlock.reason"]
        assert (
            abs(
                time.time()
                - calendar.timegm(time.strptime(tags["interlock.heartbeat"], "%Y-%m-%dT%H:%M:%SZ"))
            )
            < 300
        )


def test_none_starts_no_process_and_imports_nothing(tmp_path: Path) -> None:
    code = """
import os, sys, trainings
from pathlib import Path
result = trainings.make(Path(sys.argv[1]), track=None).fit()
assert "mlflow" not in sys.modules
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
assert not children, children
left = {path.name for path in result.run.iterdir()}
assert not left & {"tracker.json", "outbox.sqlite", "shipper.log", "outbox.lease"}, left
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
