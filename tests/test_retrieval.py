"""A run gone on with on a machine that has only the script and the tracking URI; real server, real processes."""

import gzip
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import trainings
from deliveries import Training, until
from mlflow_server import MLflowServer, RemoteRun
from orchestrator import Checkpointing
from orchestrator.commands.resume import ResumeError, _script, _uploaded_command
from orchestrator.retrieval import retrieve
from orchestrator.snapshot.storage import CheckpointDamaged
from states.table import State
from tracking.fetching import FetchError, Reference, choose, parse_reference
from tracking.journal import Checkpoint, Journal
from tracking.journal_copy import JOURNAL, journal_from_copy, write_journal_copy
from tracking.mlflow_delivery import MLflow
from tracking.runs import RunFolder, create_run, list_runs
from tracking.shipper import status

SCRIPT = """
import os, signal, sys
import torch, trainings
from orchestrator import Checkpointing, MLflow
from states import Trigger
torch.set_num_threads(1)
resume = sys.argv[1]
track = MLflow(experiment_name="far", upload="all", log_model=False) if resume != "alone" else None
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
        trainer._training.attempt.wait_for_save()  # of batch 12; what is uploaded does not hang on the machine's load
        trainer._training.attempt.sync()
        os.kill(os.getpid(), signal.SIGKILL)
trainer.fit(resume=resume if ":" in resume else False)
assert "mlflow" not in sys.modules
print("losses", trainer.attempt, *losses)
"""


@pytest.fixture(scope="module")
def server(shared_server: MLflowServer) -> MLflowServer:
    return shared_server


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


def client(server: MLflowServer, call: str, **arguments: object) -> dict[str, Any]:
    """A call of MLflow's REST interface."""
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/{call}",
        json.dumps(arguments).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


# -- which checkpoint ----------------------------------------------------------------------------------


def test_references() -> None:
    assert parse_reference("mlflow:0f3c") == Reference("0f3c")
    assert parse_reference("mlflow:0f3c@last") == Reference("0f3c")
    assert parse_reference("mlflow:0f3c@best") == Reference("0f3c", "best")
    assert parse_reference("mlflow:0f3c@epoch=2") == Reference("0f3c", "place", 2)
    assert parse_reference("mlflow:0f3c@epoch=2,batch=113") == Reference("0f3c", "place", 2, 113)
    for text in ("mlflow:0f3c@best", "mlflow:0f3c", "mlflow:0f3c@epoch=2,batch=113", "mlflow:0f3c@epoch=2"):
        assert str(parse_reference(text)) == text
    for text in ("mlflow:", "mlflow:a b", "mlflow:0f3c@", "mlflow:0f3c@worst", "mlflow:0f3c@batch=2"):
        with pytest.raises(FetchError, match="expected"):
            parse_reference(text)


def row(seq: int, epoch: int, batch: int, state: State = State.BATCH_END, best: bool = False) -> Checkpoint:
    name = f"{seq:09}-a1-e{epoch}-b{batch}-{state.value}"
    return Checkpoint(seq, name, 1, seq, epoch, batch, state, 1, 0, 0, best, {}, None, False)


def test_which_checkpoint_is_meant() -> None:
    rows = [
        row(0, -1, -1, State.IDLE),
        row(10, 0, 1),
        row(20, 0, 3),
        row(30, 0, 3, State.EPOCH_END, best=True),
        row(40, 1, 1),
        row(50, 1, 3, State.EPOCH_END, best=True),
        row(60, 2, 0),
    ]
    there = {found.name: 1 for found in rows if found.seq != 50}

    def meant(text: str) -> list[int]:
        return [found.seq for found in choose(parse_reference(f"mlflow:a{text}"), rows, there)]

    assert meant("") == [60, 40, 30, 20, 10, 0]
    assert meant("@best") == [30], "the best of those that are there"
    assert meant("@epoch=0") == [30]
    assert meant("@epoch=0,batch=3") == [30]
    assert meant("@epoch=0,batch=1") == [10]
    with pytest.raises(FetchError, match=f"of epoch 3.*found {rows[0].name}.*{rows[6].name}"):
        meant("@epoch=3")
    with pytest.raises(FetchError, match="epoch 1, batch 3"):
        choose(parse_reference("mlflow:a@epoch=1,batch=3"), rows, {found.name: 1 for found in rows[:5]})
    with pytest.raises(FetchError, match="no checkpoint of this run is at the server"):
        choose(parse_reference("mlflow:a"), rows, {})


@pytest.mark.long
def test_a_checkpoint_by_name_and_a_folder_that_is_here(
    tmp_path: Path, server: MLflowServer, remote: RemoteRun
) -> None:
    said: list[str] = []
    tracker = MLflow(server.uri)
    best = retrieve(f"mlflow:{remote.id}@best", tracker, tmp_path, say=said.append)
    assert best.checkpoint is not None
    assert best.checkpoint.name == remote.tags["interlock.checkpoint.best"]
    assert best.checkpoint.parent == best.run.checkpoints
    assert "was fetched from" in said[0]
    assert "RUNNING" not in "".join(said), "its shipper has seen the end"
    assert_sound(best.run)
    kept = best.run.path / "kept"
    kept.touch()
    epoch, batch = remote.tags["interlock.checkpoint.last"].split("-")[2:4]
    place = f"@epoch={epoch[1:]},batch={batch[1:]}"
    again = retrieve(f"mlflow:{remote.id}{place}", tracker, tmp_path, say=said.append)
    assert (again.run, again.new, kept.exists()) == (best.run, False, True)
    assert again.checkpoint is not None
    assert again.checkpoint.name == remote.tags["interlock.checkpoint.last"]
    assert "already" in said[-1]
    assert {path.name for path in best.run.checkpoints.iterdir()} == {
        best.checkpoint.name,
        again.checkpoint.name,
    }
    assert not [path for path in tmp_path.iterdir() if path != best.run.path], "nothing else is left"
    with pytest.raises(FetchError, match=rf"expected one of epoch 7.*found .*{best.checkpoint.name}"):
        retrieve(f"mlflow:{remote.id}@epoch=7", tracker, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.long
def test_a_moment_of_a_run_that_is_elsewhere(tmp_path: Path, server: MLflowServer, remote: RemoteRun) -> None:
    trainer = trainings.make(
        tmp_path,
        val_loader=trainings.loader(16),
        track=MLflow(server.uri),
        checkpoint=Checkpointing(every_batches=4, keep_last=3, best="val/loss"),
    )
    with pytest.warns(UserWarning, match="was fetched from"):
        trainer.seek(epoch=2, batch=0, state=State.BACKWARD, run=f"mlflow:{remote.id}")
    assert (trainer.epoch, trainer.batch, trainer.state) == (2, 0, State.BACKWARD)
    assert trainer.divergence is None, "its losses are those that the uploaded journal has"
    trainer.close()


# -- what is in the way ---------------------------------------------------------------------------------


@pytest.mark.long
def test_what_cannot_be_had(tmp_path: Path, server: MLflowServer) -> None:
    tracker = MLflow(server.uri)
    with pytest.raises(FetchError, match=f"{server.uri}: there is no MLflow run '{'0' * 32}'"):
        retrieve(f"mlflow:{'0' * 32}", tracker, tmp_path)
    foreign = client(server, "runs/create", experiment_id="0", run_name="theirs")["run"]["info"]["run_id"]
    with pytest.raises(FetchError, match=r"\(theirs\) was not made by interlock"):
        retrieve(f"mlflow:{foreign}", tracker, tmp_path)
    for odd in ("../a-20260101-000000-0000", "digits"):
        client(server, "runs/set-tag", run_id=foreign, key="interlock.run_id", value=odd)
        with pytest.raises(FetchError, match=f"interlock.run_id is '{odd}'; expected an id such as"):
            retrieve(f"mlflow:{foreign}", tracker, tmp_path)
    client(server, "runs/set-tag", run_id=foreign, key="interlock.run_id", value="a-20260101-000000-0000")
    with pytest.raises(FetchError, match=r"has no journal.sqlite.gz at the server"):
        retrieve(f"mlflow:{foreign}", tracker, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_server_that_is_away_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(
        FetchError, match=r"http://ann:\*\*\*@127.0.0.1:9: cannot find the run.*tried for 2 s"
    ) as error:
        retrieve("mlflow:0f3c", MLflow("http://ann:hunter2@127.0.0.1:9"), tmp_path, wait_s=2.0)
    assert time.monotonic() - began < 60
    assert "hunter2" not in str(error.value)


@pytest.mark.long
def test_a_damaged_upload_is_named_and_the_one_before_taken(
    tmp_path: Path, server: MLflowServer, remote: RemoteRun
) -> None:
    folder = next((server.folder / "artifacts").rglob(f"{remote.id}/artifacts/checkpoints"))
    newest, before = sorted((path.name for path in folder.iterdir()), reverse=True)[:2]
    file = folder / newest / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        said: list[str] = []
        found = retrieve(f"mlflow:{remote.id}", MLflow(server.uri), tmp_path / "one", say=said.append)
        names = sorted(path.name for path in found.run.checkpoints.iterdir())
        assert names[-1] == before, "an older one may be there because it is the best"
        assert f"passing over checkpoint {newest}" in said[0]
        assert "model.safetensors" in said[0]
        assert_sound(found.run)
        epoch, batch = newest.split("-")[2:4]
        place = f"@epoch={epoch[1:]},batch={batch[1:]}"
        with pytest.raises(CheckpointDamaged, match=r"model.safetensors"):
            retrieve(f"mlflow:{remote.id}{place}", MLflow(server.uri), tmp_path / "two")
        assert not list((tmp_path / "two").iterdir())
    finally:
        file.write_bytes(whole)


# -- going on ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_interlock_resume_starts_the_script_that_is_here(
    tmp_path: Path, server: MLflowServer, unbroken: list[str]
) -> None:
    first = machine(tmp_path / "a")
    assert train(first, server, "kill").returncode == -signal.SIGKILL
    (run,) = list_runs(first / "runs")
    wait_until_delivered(run)
    remote = server.database.run(run.id)
    first.rename(tmp_path / "gone")
    place = machine(tmp_path / "b")
    (place / "train.py").rename(place / "other.py")
    command = [sys.executable, "-m", "orchestrator.cli", "resume", f"mlflow:{remote.id}"]
    surroundings = environment(server)
    del surroundings["MLFLOW_TRACKING_URI"]
    command += ["--tracking-uri", server.uri]
    done = subprocess.run(command, cwd=place, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected train.py there or in this folder" in done.stderr
    (place / "other.py").rename(place / "train.py")
    done = subprocess.run(command, cwd=place, env=surroundings, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, "the very same command, which kills itself"
    (here,) = list_runs(place / "runs")
    wait_until_delivered(here)
    (place / "train.py").write_text(SCRIPT.replace('"kill"', '"no more"'))
    done = subprocess.run(command, cwd=place, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "already" in done.stderr
    assert batch_losses(here) == unbroken
    assert_sound(here)
    wait_until_delivered(here)
    assert server.database.run(run.id).tags["interlock.attempt"] == "3"


def test_only_a_script_that_is_here_is_started() -> None:
    assert _script(["-u", "-X", "faulthandler", "train.py", "-c", "1"]) == "train.py"
    for words in ([], ["-"], ["-c", "print()"], ["-m", "train"], ["-u", "-c", "print()", "train.py"]):
        assert _script(words) is None


def test_a_command_whose_secrets_stayed_behind_is_not_started(tmp_path: Path) -> None:
    run = create_run(tmp_path / "here", "digits")
    training = Training(run)
    training.batch()
    training.end("stopped")
    with sqlite3.connect(run.journal) as journal:
        argv = {
            "argv": ["python", "train.py", "--token", "hunter2"],
            "executable": sys.executable,
            "cwd": "/x",
        }
        journal.execute("UPDATE attempts SET command = ?", (json.dumps(argv),))
    there = create_run(tmp_path / "there", "digits")
    write_journal_copy(run, tmp_path / JOURNAL)
    assert b"hunter2" not in gzip.decompress((tmp_path / JOURNAL).read_bytes())
    there.journal.unlink()
    journal_from_copy(tmp_path / JOURNAL, there.journal)
    with pytest.raises(
        ResumeError, match=r"with secrets.*INTERLOCK_RESUME=.* python train.py --token '\*\*\*'"
    ):
        _uploaded_command(there, str(there.path))


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
        best = [row for row in journal.checkpoints(include_removed=True) if row.best]
    values = [row.metrics["val/loss"] for row in best]
    assert values == sorted(values, reverse=True), "the best is known on the new machine too"
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
