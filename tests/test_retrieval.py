"""A run gone on with on a machine that has only the script and the tracking URI; real server, real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deliveries import until
from mlflow_server import MLflowServer, RemoteRun
from orchestrator.retrieval import retrieve
from tracking.fetching import FetchError
from tracking.journal import Journal
from tracking.mlflow_delivery import MLflow
from tracking.runs import RunFolder, list_runs
from tracking.shipper import status

SCRIPT = """
import os, signal, sys
import torch, trainings
from orchestrator import Checkpointing, MLflow
from states import Trigger
torch.set_num_threads(1)
resume = sys.argv[1]
track = MLflow(experiment="far", upload="all") if resume != "alone" else None
trainer = trainings.make(
    "runs", val_loader=trainings.loader(16), track=track,
    checkpoint=Checkpointing(every_batches=4, keep_last=3, best="val/loss"),
)
losses = []
@trainer.after(Trigger.END_BATCH)
def note():
    losses.append(trainer.metrics["loss"].hex())
@trainer.after(Trigger.STEP)
def kill():
    if resume == "kill" and trainer.batches == 14:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.fit(resume=resume if ":" in resume else False)
assert "mlflow" not in sys.modules
print("losses", trainer.attempt, *losses)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    with MLflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def machine(folder: Path) -> Path:
    """A folder with nothing in it but the script."""
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    return folder


def environment(server: MLflowServer) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "MLFLOW_TRACKING_URI": server.uri}


def train(place: Path, server: MLflowServer, what: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "train.py", what], cwd=place, env=environment(server), capture_output=True, text=True
    )


def losses_in(output: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith("losses"))
    return line.split()[2:]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, server: MLflowServer) -> list[str]:
    done = train(machine(tmp_path_factory.mktemp("unbroken") / "a"), server, "alone")
    assert done.returncode == 0, done.stderr
    return losses_in(done.stdout)


def wait_until_delivered(run: RunFolder) -> None:
    until(lambda: status(run).shipper is None and not status(run).points_waiting, 90)
    left = status(run)
    # One whose removal was not written down any more is waited for in vain.
    assert not any((run.path / path).exists() for path in left.artifacts_waiting), left
    assert not left.trouble, left


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, server: MLflowServer) -> RunFolder:
    """A run that was killed in its third epoch, delivered by its shipper; 14 batches, checkpoints at 4, 6, 8, 12."""
    place = machine(tmp_path_factory.mktemp("first") / "a")
    assert train(place, server, "kill").returncode == -signal.SIGKILL
    (run,) = list_runs(place / "runs")
    wait_until_delivered(run)
    return run


@pytest.fixture
def remote(server: MLflowServer, killed: RunFolder) -> RemoteRun:
    return server.database.run(killed.id)


def batch_losses(run: RunFolder) -> list[str]:
    with Journal.open(run) as journal:
        rows = journal.metrics(scope="train", key="loss")
        return [row.value.hex() for row in rows if row.batch >= 0]


def assert_sound(run: RunFolder) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "check", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fresh_machine_goes_on_with_the_same_run_exactly(
    tmp_path: Path, server: MLflowServer, killed: RunFolder, unbroken: list[str]
) -> None:
    before = server.database.run(killed.id)
    place = machine(tmp_path / "b")
    done = train(place, server, f"mlflow:{before.id}")
    assert done.returncode == 0, done.stderr
    assert "was fetched from" in done.stderr
    (run,) = list_runs(place / "runs")
    assert run.id == killed.id
    losses = losses_in(done.stdout)
    assert 6 <= len(losses) < 18, "it goes on from the newest checkpoint that was durable"
    assert losses == unbroken[-len(losses) :]
    assert batch_losses(run) == unbroken
    assert_sound(run)
    with Journal.open(run) as journal:
        attempts = journal.attempts()
    assert [attempt.outcome for attempt in attempts] == ["died", "done"]
    wait_until_delivered(run)
    after = server.database.run(killed.id)
    assert (after.id, after.status, after.tags["interlock.attempt"]) == (before.id, "FINISHED", "2")
    steps = [(key, step) for key, step, *_ in after.points]
    assert len(steps) == len(set(steps)), "points are there twice"
    assert [step for key, step in steps if key == "batch/loss"] == list(range(1, 19))
    assert {key: value for key, value in after.params.items() if key != "x"} == before.params

    # A third machine: the run is done, and that is said by returning its result.
    third = machine(tmp_path / "c")
    done = train(third, server, f"mlflow:{before.id}")
    assert done.returncode == 0, done.stderr
    assert losses_in(done.stdout) == []
    # On the first machine the folder is behind: nothing is overwritten, and the way on is named.
    with pytest.raises(FetchError, match=r"gone on with elsewhere \(attempt 2"):
        retrieve(f"mlflow:{before.id}", MLflow(server.uri), killed.path.parent)
