"""Exactly once, whatever fails: a real MLflow server behind a proxy that drops, delays, refuses and cuts."""

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deliveries import BATCHES, Training, assert_each_once, assert_once, go_back, train_in_child, until
from faulty_proxy import FaultyProxy, at_random, each, nothing
from mlflow_server import MLflowServer, RemoteRun
from postgres import PostgresCluster, PostgresDatabase, find_binaries
from tracking.mlflow_delivery import MLflow
from tracking.outbox import read_outbox
from tracking.runs import RunFolder, lease_holder
from tracking.shipper import start_shipper, status, sync

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


@pytest.fixture
def server(shared_server: MLflowServer) -> MLflowServer:
    return shared_server


@pytest.fixture
def proxy(server: MLflowServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port) as proxy:
        yield proxy


def log_of(run: RunFolder) -> str:
    return (run.path / "shipper.log").read_text()


def files_of(server: MLflowServer, remote: RemoteRun) -> dict[str, bytes]:
    """The run's artifacts by their paths, as they lie in the server's store."""
    (home,) = (server.folder / "artifacts").glob(f"*/{remote.id}/artifacts")
    return {
        file.relative_to(home).as_posix(): file.read_bytes() for file in home.rglob("*") if file.is_file()
    }


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
            "train",
            training.walk.epoch,
            training.walk.batch,
            number + 1,
            odd,
            1_700_000_000_000_000_000 + number,
        )
        if number in (batches // 2, batches - 1):
            names.add(training.checkpoint(best=number != batches - 1))
    training.writer.sync()
    return training, names


# -- one fault after another -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("fault", ["cut", "half"])
def test_each_request_is_served_and_its_answer_lost(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy, fault: str
) -> None:
    proxy.choose = each(fault)
    training, names = train(run, 2 * BATCHES)
    training.end("failed", "because", "ValueError: no")
    report = sync(run, tracker=MLflow(proxy.uri, f"each {fault}"), timeout=60)
    assert report.complete, log_of(run)
    assert proxy.faults([fault]) >= REQUESTS
    remote = assert_delivered(run, server, names)
    assert (remote.status, remote.tags["interlock.state"]) == ("FAILED", "HALTED")
    assert remote.tags["interlock.exception"] == "ValueError: no"
    assert len(server.database.runs(run.id)) == 1


@pytest.mark.long
@pytest.mark.parametrize("late_s", [1.5, 4.0])
def test_each_request_is_served_long_after_it_was_given_up(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy, late_s: float
) -> None:
    """Old tags come after new ones, RUNNING after its end, a second run after the first: set right at the end."""
    proxy.choose, proxy.late_s = each("late"), late_s
    training, names = train(run, BATCHES)
    shipper = start_shipper(run, MLflow(proxy.uri, f"late {late_s}"))
    until(lambda: ("log-batch tags", "late") in proxy.met, 60)
    training.end()
    assert shipper is not None
    assert shipper.wait(120) == 0, log_of(run)
    assert proxy.faults(["late"]) >= REQUESTS
    proxy.settle()
    remote = assert_delivered(run, server, names)
    assert (remote.status, remote.tags["interlock.outcome"]) == ("FINISHED", "done")
    assert remote.tags["interlock.state"] == "DONE"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_faults_at_random_while_a_run_trains(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy, seed: int
) -> None:
    proxy.choose = at_random(seed, 0.35)
    tracker = MLflow(proxy.uri, f"random {seed}", upload="all")
    shipper = start_shipper(run, tracker)
    training, names = train(run, 600, pause_s=0.05)
    training.end()
    assert shipper is not None
    until(lambda: shipper.poll() is not None, 180)
    assert shipper.returncode == 0, log_of(run)
    proxy.settle()
    remote = assert_delivered(run, server, names)
    assert remote.status == "FINISHED"
    assert sum(proxy.met[request, fault] for request, fault in proxy.met if fault != "pass") > 5
    outages = log_of(run).count("trying again until it works")
    assert 1 <= outages <= 2 * (1 + math.log2(sum(proxy.met.values()))), "few lines about many outages"


# -- outages -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_server_that_never_answers(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training does not notice; at the end the shipper says what is left, and leaves; two lines in all."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.choose = lambda what: "hang"
    shipper = start_shipper(run, MLflow(proxy.uri, "silent", patience_s=1.0))
    training, names = train(run, BATCHES)
    until(lambda: proxy.met, 60)
    training.end()
    assert shipper is not None
    until(lambda: shipper.poll() is not None, 60)
    assert shipper.returncode == 1
    first, last = log_of(run).splitlines()
    assert "gives no answer: Read timed out" in first
    assert f"deliver them with: interlock sync {run.id}" in last
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    proxy.choose = nothing
    assert sync(run, timeout=60).complete, log_of(run)
    assert_delivered(run, server, names)


@pytest.mark.long
@pytest.mark.timeout(1200)  # its waits alone may be longer than the others' time
def test_a_long_outage_takes_little_memory_and_few_words(
    run: RunFolder, server: MLflowServer, proxy: FaultyProxy
) -> None:
    """A server that fails again and again, while 150,000 batches are trained; all of them arrive."""
    proxy.choose = nothing
    training = Training(run)
    shipper = start_shipper(run, MLflow(proxy.uri, "long", upload="none"))
    assert shipper is not None
    training.batch()
    training.writer.sync()
    until(lambda: status(run).points_delivered, 120)
    proxy.choose = at_random(3, 0.3)
    before = memory_kb(shipper.pid)
    for _ in range(150_000):
        training.batch()
    training.writer.sync()
    until(lambda: sum(n for (_, fault), n in proxy.met.items() if fault != "pass") > 60, 300)
    assert memory_kb(shipper.pid) < before + 100_000
    assert len(log_of(run).splitlines()) < 30
    proxy.choose = nothing
    training.end()
    until(lambda: shipper.poll() is not None, 600)
    assert shipper.returncode == 0, log_of(run)
    assert (run.path / "outbox.sqlite").stat().st_size < 2_000_000
    remote = server.database.run(run.id)
    steps = [step for key, step, _, _ in remote.points if key == "batch/loss"]
    assert len(set(steps)) == len(steps)
    assert max(steps) == training.done


def memory_kb(process: int) -> int:
    """The most that it has held so far."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0])


# -- everything dies ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_trainer_shipper_and_server_are_killed(run: RunFolder, server: MLflowServer) -> None:
    everything_dies(run, server, random.Random(1), attempts=2)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_everything_is_killed_again_and_again(run: RunFolder, server: MLflowServer, seed: int) -> None:
    everything_dies(run, server, random.Random(seed), attempts=5)


def everything_dies(run: RunFolder, server: MLflowServer, chance: random.Random, attempts: int) -> None:
    """Trainings that are killed and go back, each time perhaps on a machine that has no outbox."""
    position: int | None = None
    done = highest = 0
    with FaultyProxy(server.port, at_random(chance.randrange(99), 0.2)) as proxy:
        tracker = MLflow(proxy.uri, "deaths", upload="none")
        for number in range(attempts):
            trainer = train_in_child(
                run,
                f"""
training = Training(run, {position}, {done})
start_shipper(run, MLflow({proxy.uri!r}, "deaths", upload="none"))
while True: training.batch(0.01)
""",
            )
            before = read_outbox(run.outbox).points
            until(lambda before=before: read_outbox(run.outbox).points > before, 120)
            for what in chance.sample(["shipper", "server", "shipper"], 2):
                time.sleep(chance.uniform(0.5, 3.0))
                if what == "server":
                    server.stop()
                    time.sleep(chance.uniform(0.0, 2.0))
                    server.start()
                elif kill_shipper(run):
                    start_shipper(run, tracker)
            trainer.kill()
            trainer.wait()
            proxy.settle()
            if number % 2:
                kill_shipper(run)
                run.outbox.unlink(missing_ok=True)  # a fresh machine
            position, done, reached = go_back(run, chance)
            highest = max(highest, reached)
        last = Training(run, position, done)
        while last.done <= highest:
            last.batch()
        last.end()
        proxy.choose = nothing
        report = sync(run, tracker=tracker, timeout=60)
        assert report.complete, log_of(run)
        remote = server.database.run(run.id)
        assert_each_once(run, remote)
        assert remote.params == {"lr": "0.1"}
        assert (remote.status, remote.tags["interlock.state"]) == ("FINISHED", "DONE")
        assert remote.tags["interlock.attempt"] == str(attempts + 1)
        assert all(remote.tags[f"interlock.attempt.{n}"].startswith("died: ") for n in range(1, attempts + 1))
        assert remote.tags[f"interlock.attempt.{attempts + 1}"].startswith("done")


def kill_shipper(run: RunFolder) -> bool:
    holder = lease_holder(run.outbox_lease)
    if holder is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGKILL)
    until(lambda: (now := lease_holder(run.outbox_lease)) is None or now.pid != holder.pid)
    return True


# -- PostgreSQL --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with PostgresCluster(binaries) as cluster:
        yield cluster


@pytest.mark.long
@pytest.mark.timeout(600)
def test_faults_at_random_before_a_server_on_postgresql(
    run: RunFolder, cluster: PostgresCluster, tmp_path: Path
) -> None:
    """The server is killed too, and the database."""
    with (
        MLflowServer(tmp_path, store=cluster.uri) as server,
        FaultyProxy(server.port, at_random(1, 0.3)) as proxy,
    ):
        server.database = PostgresDatabase(cluster.uri)
        shipper = start_shipper(run, MLflow(proxy.uri, "postgres", upload="all"))
        training, names = train(run, 200, pause_s=0.02)
        until(lambda: status(run).points_delivered, 60)
        cluster.stop()
        training.batch(2.0)
        cluster.start()
        server.stop()
        training.batch(1.0)
        server.start()
        training.end()
        assert shipper is not None
        until(lambda: shipper.poll() is not None, 300)
        assert shipper.returncode == 0, log_of(run)
        proxy.settle()
        remote = assert_delivered(run, server, names)
        assert remote.status == "FINISHED"


@pytest.mark.long
def test_a_postgresql_store_without_a_server(
    run: RunFolder, cluster: PostgresCluster, tmp_path: Path
) -> None:
    """The database is away at the start, and in the middle."""
    cluster.stop()
    training = Training(run)
    shipper = start_shipper(run, MLflow(cluster.uri, "direct", upload="none"))
    training.batch()
    until(lambda: "tracking server: cannot" in log_of(run), 60)
    cluster.start()
    until(lambda: status(run).points_delivered, 60)
    cluster.stop()
    training.batch()
    training.writer.sync()
    until(lambda: log_of(run).count("tracking server: cannot") == 2, 60)
    cluster.start()
    training.batch()
    training.end()
    assert shipper is not None
    until(lambda: shipper.poll() is not None, 120)
    assert shipper.returncode == 0, log_of(run)
    remote = PostgresDatabase(cluster.uri).run(run.id)
    assert_once(run, remote)
    assert remote.status == "FINISHED"
    lines = [line for line in log_of(run).splitlines() if line.strip()]
    assert len(lines) < 12, "few words, also by MLflow"
