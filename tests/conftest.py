"""Hypothesis profiles, one torch thread for each worker of pytest, and trainings to test with."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from mlflow_server import Database, MLflowServer
from orchestrator.snapshot import deferred, writer
from tracking import packed
from tracking.runs import RunFolder, create_run

if "INTERLOCK_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # trainings are on the processor, on any machine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell without job control; tests interrupt the processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_quiet)
settings.register_profile(
    "ci", max_examples=60, deadline=None, suppress_health_check=_quiet, derandomize=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


SHARED = {"shared_server", "store", "servers", "work_tree"}
"""Fixtures that take long to make, and serve many tests: one worker of pytest has all that use them."""


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in sorted(SHARED.intersection(getattr(item, "fixturenames", ()))):
        item.add_marker(pytest.mark.xdist_group(name))
        break


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _little_goes_the_ways_of_much() -> None:
    """Small states are copied later, and few batches written in blocks: every test of exactness is one of that too."""
    deferred._LEAST = 1
    writer.processors = lambda: 2  # of which torch uses one
    packed.LEAST_ROWS = 16


@pytest.fixture(autouse=True, scope="session")
def _one_store_is_made(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By whichever worker of pytest first needs one, for all."""
    base = tmp_path_factory.getbasetemp()
    Database.template = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store.db"


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A real MLflow server for all tests that make experiments of their own in it, and leave it running."""
    folder = tmp_path_factory.mktemp("server")
    Database.made(folder / "mlflow.db", "mlflow-artifacts:/0")
    with MLflowServer(folder) as server:
        yield server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A plain SQLite store of MLflow's, for all tests that look at nothing in it but their own runs."""
    return Database.made(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def own_store(tmp_path: Path) -> Database:
    """A plain SQLite store with nothing in it, for a test that looks at all there is: `mlflow.db` in `tmp_path`."""
    return Database.made(tmp_path / "mlflow.db")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run's folder with nothing in it yet."""
    return create_run(tmp_path, "digits")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests see does not depend on who runs them, or from where."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "INTERLOCK_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """A test, or the code it tests, closes what it opened."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("interlock")]
    assert not left, left
