"""Exactly once, whatever fails: a real MLflow server behind a proxy that drops, delays, refuses and cuts."""

import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deliveries import BATCHES, Training, assert_once, until
from faulty_proxy import SERVED_AND_LOST, FaultyProxy, at_random, each, nothing
from mlflow_server import MLflowServer, RemoteRun
from tracking.mlflow_delivery import MLflow
from tracking.runs import RunFolder, create_run
from tracking.shipper import start_shipper, sync

REQUESTS = {
    "experiments/create",
    "runs/create",
    "runs/update",
    "log-batch metrics",
    "log-batch params",
    "log-batch tags",
    "artifact PUT",
}
"""What the shipper asks that changes something, but for removals, which are tried below."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    with MLflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: MLflowServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path, "digits")


def log_of(run: RunFolder) -> str:
    return (run.path / "shipper.log").read_text()


def files_of(server: MLflowServer, remote: RemoteRun) -> dict[str, bytes]:
    """The run's artifacts by their paths, as they lie in the server's store."""
    (home,) = (server.folder / "artifacts").glob(f"*/{remote.id}/artifacts")
    return {file.relative_to(home).as_posix(): file.read_bytes() for file in home.rglob("*") if file.is_file()}


def assert_delivered(run: RunFolder, server: MLflowServer, kept: set[str]) -> RemoteRun:
    """One run, each point, param, tag and artifact once, and nothing else."""
    remote = server.database.run(run.id)
    assert_once(run, remote)
    assert remote.params == {"lr": "0.1"}
    artifacts = files_of(server, remote)
    here = {
        f"checkpoints/{name}/{file.name}": file.read_bytes()
        for name in kept
        for file in (run.checkpoints / name).iterdir()
    }
    assert {path: data for path, data in artifacts.items() if path.startswith("checkpoints/")} == here
    assert "transitions.jsonl.gz" in artifacts
    return remote


def train(run: RunFolder, batches: int, pause_s: float = 0.0) -> tuple[Training, set[str]]:
    """Batches with values that stores have trouble with, and two checkpoints."""
    training = Training(run)
    names = set()
    for number in range(batches):
        training.batch(pause_s)
        odd = {"odd": (math.nan, math.inf, -math.inf, 5e-324, 0.1)[number % 5]}
        training.writer.metrics(
            "train", training.walk.epoch, training.walk.batch, number + 1, odd, 1_700_000_000_000_000_000 + number
        )
        if number in (batches // 2, batches - 1):
            names.add(training.checkpoint(best=number != batches - 1))
    training.writer.sync()
    return training, names


@pytest.mark.parametrize("fault", ["cut", pytest.param("late", marks=pytest.mark.long)])
def test_each_request_is_served_once_and_its_answer_lost(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy, fault: str
) -> None:
    proxy.choose = each(fault)
    training, names = train(run, 2 * BATCHES)
    training.end("failed", "because", "ValueError: no")
    report = sync(run, tracker=MLflow(proxy.uri, f"each {fault}"), timeout=60)
    assert report.complete, log_of(run)
    assert proxy.faults([fault]) >= REQUESTS
    proxy.settle()
    remote = assert_delivered(run, server, names)
    assert (remote.status, remote.tags["interlock.state"]) == ("FAILED", "HALTED")
    assert remote.tags["interlock.exception"] == "ValueError: no"
